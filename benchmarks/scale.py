"""What training and a whole evaluation ask of a denoiser, counted: `docs/scale.md`. Nothing is timed.

    python benchmarks/scale.py --out docs/results/scale.json

Floating point operations of one row are counted by torch on the real denoisers' shapes, which hold no weights (meta
tensors). Rows are counted by the attacks themselves (`passes`, as for `--dry-run`) at their authors' budgets. What a
GPU sustains of its peak is not known here: `--sustained` is an assumption, and every hour that is told rests on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from duo.recipe import load_recipe
from duo.red_team import red_team
from duo.rundir import write_json

BACKWARD = 2  # a backward pass costs about as much as two forward ones
GUIDED = 2  # rows of the denoiser for one step of an image with classifier-free guidance
STEPS = 50
ATTACKS = ("prompts", "ring_a_bell", "concept_inversion", "sneaky_prompt", "unlearn_diff_atk", "p4d")
MACHINES = (1, 8, 64)


def sd14() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768), {
        "sample": torch.empty(1, 4, 64, 64),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.empty(1, 77, 768),
    }


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return unet, {
        "sample": torch.empty(1, 4, 128, 128),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.empty(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)},
    }


def sd3() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, out_channels=16, pos_embed_max_size=192
    )
    return transformer, {
        "hidden_states": torch.empty(1, 16, 128, 128),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.empty(1, 333, 4096),
        "pooled_projections": torch.empty(1, 2048),
    }


def flux() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": torch.empty(1, 4096, 64),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "txt_ids": torch.zeros(512, 3),
        "img_ids": torch.zeros(4096, 3),
    }


Made = Callable[[], tuple[nn.Module, dict[str, Any]]]
DENOISERS: Mapping[str, tuple[Made, int]] = {  # with the rows of one step of an image
    "Stable Diffusion 1.4, 512²": (sd14, GUIDED),
    "SDXL, 1024²": (sdxl, GUIDED),
    "SD3 medium, 1024²": (sd3, GUIDED),
    "FLUX.1 dev, 1024²": (flux, 1),  # its guidance is a number that it is given
}


def counted(make: Made, rows: int) -> dict[str, float]:
    """Parameters, and operations of a forward pass of one row: two for each multiplication with its addition."""
    with torch.device("meta"):
        denoiser, inputs = make()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            denoiser(**inputs)
    return {
        "parameters": sum(one.numel() for one in denoiser.parameters()),
        "tflop_a_row": counter.get_total_flops() / 1e12,
        "rows_a_step_of_an_image": rows,
    }


def step_of_duo(batch: int) -> dict[str, int]:
    """Rows of one training step by the published objective: both images of a pair, and pure noise."""
    return {"forward": 2 * 3 * batch, "trained": 3 * batch}


def evaluation(prompts: int, methods: int) -> dict[str, dict[str, int]]:
    """Rows by attack, for so many prompts and erasures, with the original model beside them, an image a prompt."""
    authors = red_team(load_recipe("sd14-nudity-beta500"), budget="published")
    budget = {row.name: row.make() for row in reversed(authors.attacks)}  # of several rows of an attack the first
    models, found = methods + 1, {}
    for name in ATTACKS:
        made = budget[name]
        passes = made.passes(prompts) if hasattr(made, "passes") else {}
        images = prompts * (1 + getattr(made, "queries", 0))
        forward = images * STEPS * GUIDED + passes.get("denoiser", 0)
        found[name] = {
            "images": models * images,
            "forward": models * forward,
            "trained": models * passes.get("trained", 0),
        }
    return found


def operations(rows: Mapping[str, int], tflop_a_row: float) -> float:
    """In TFLOP."""
    return (rows["forward"] + BACKWARD * rows["trained"]) * tflop_a_row


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=30_000)
    parser.add_argument("--methods", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--sustained", type=float, default=200.0, help="TFLOP/s of one GPU; an assumption")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    denoisers = {name: counted(*how) for name, how in DENOISERS.items()}
    heads = ("denoiser", "parameters", "TFLOP a row", "a step of DUO, TFLOP", f"an image of {STEPS} steps, TFLOP")
    print(table_row(heads), table_row(["---"] * len(heads)), sep="\n")
    for name, one in denoisers.items():
        row, image = one["tflop_a_row"], STEPS * one["rows_a_step_of_an_image"]
        step = operations(step_of_duo(given.batch), row)
        print(table_row((name, f"{one['parameters'] / 1e9:.2f} G", f"{row:.2f}", f"{step:.0f}", f"{image * row:.0f}")))
    attacks = evaluation(given.prompts, given.methods)
    row = next(iter(denoisers.values()))["tflop_a_row"]
    hours = {name: operations(one, row) / given.sustained / 3600 for name, one in attacks.items()}
    print(f"\n{given.prompts:,} prompts, {given.methods} methods and the original model, {next(iter(denoisers))}:\n")
    heads = ("attack", "images", "rows forward", "of these with backward", *(f"days on {n}" for n in MACHINES))
    print(table_row(heads), table_row(["---"] * len(heads)), sep="\n")
    total = {key: sum(one[key] for one in attacks.values()) for key in ("images", "forward", "trained")}
    for name, one in [*attacks.items(), ("total", total)]:
        days = (hours[name] if name in hours else sum(hours.values())) / 24
        each = (f"{days / n:,.1f}" for n in MACHINES)
        counts = (f"{one[key]:,}" for key in ("images", "forward", "trained"))
        print(table_row((name, *counts, *each)))
    if given.out:
        told = {**vars(given), "out": None, "denoisers": denoisers, "attacks": attacks, "hours_on_one_gpu": hours}
        write_json(given.out, {key: value for key, value in told.items() if value is not None})


if __name__ == "__main__":
    main()
