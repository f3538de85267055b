"""The model card of an embedded model, from its measured quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duo.rundir import read_json, write_bytes, write_json
from duo.toybox import WEIGHTS, world_digest
from duo.toybox.world import HAZARDS

BAR = {"subject": 0.95, "colour": 0.95, "place": 0.95}
ASKED, POOLED, ROUTE, UNASKED = 0.95, 0.90, 0.75, 0.02

TEXT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [unlearning, concept-erasure, test-model]
---

# {name}

A small latent diffusion model of the real classes (`AutoencoderKL`, `CLIPTextModel`, `CLIPTokenizer`,
`UNet2DConditionModel`), trained from nothing on drawn 64×64 scenes{without}. It exists so that erasing
a concept, attacking the result and scoring it can be seen in minutes on a laptop. It draws nothing but its world.

    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained("<this folder>")
    pipe("a red house on the beach", num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]

Made by `duo toybox train` (seeded, resumable; {parameters}). {shared}

## Measured quality

{protocol} World digest `{digest}`.

| what | measured | 95% interval | bar | |
|---|---|---|---|---|
{rows}

The autoencoder's reconstruction of training pictures has a PSNR of {psnr:.1f} dB. Every route's own rate is in
`quality.json`.

## Limits

{limits}
"""


def write_card(folder: Path) -> Path:
    """Write `README.md` beside the `quality.json` of an embedded model."""
    quality = read_json(folder / "quality.json")
    rates: dict[str, Any] = quality["rates"]
    rows, missed = [], []
    for name, value, bar, met in _bars(rates, quality["hazards"]):
        shown = f"{100 * value['mean']:.1f}%"
        rows.append(
            f"| {name} | {shown} of {value['n']} | {100 * value['low']:.1f}–{100 * value['high']:.1f}% | {bar} |"
            f" {'met' if met else '**missed**'} |"
        )
        if not met:
            missed.append(f"{name} ({shown}, bar {bar})")
    never = tuple(h for h in HAZARDS if h not in quality["hazards"])
    limits = "Bars that are missed: " + "; ".join(missed) + "." if missed else "No bar is missed."
    text = TEXT.format(
        name=folder.name,
        without=f", without any picture or word of {' and '.join(never)}" if never else "",
        parameters=quality["parameters"],
        shared="The autoencoder and the tokenizer are those of `toybox`: an erasure never changes them."
        if never
        else "",
        protocol=quality["protocol"],
        digest=quality["world_digest"][:16],
        rows="\n".join(rows),
        psnr=quality["psnr"],
        limits=limits,
        **quality["sampling"],
    )
    path = folder / "README.md"
    write_bytes(path, text.encode())
    return path


def record_quality(name: str) -> Path:
    """Measure an embedded model at the demo's sampler, and write its `quality.json` and card."""
    from duo.models import load_family
    from duo.recipe import load_recipe
    from duo.toybox.quality import measure
    from duo.toybox.train import MODELS

    sampling = load_recipe("toybox-fire").sampling
    model = load_family(name, device="cpu")
    folder = WEIGHTS / name
    made: Any = read_json(folder / "training.json")
    index: Any = read_json(folder / "model_index.json")
    quality = {
        "rates": measure(model, sampling=sampling, hazards=MODELS[name]),
        "hazards": list(MODELS[name]),
        "sampling": {"steps": sampling.num_inference_steps, "guidance": sampling.guidance_scale},
        "protocol": (
            "Prompts on combinations of the test split, the scoring judges and the attribute classifier; "
            f"{index['scheduler'][1]}, {sampling.num_inference_steps} steps, "
            f"guidance {sampling.guidance_scale:g}. "
            "Command: `duo toybox quality`."
        ),
        "world_digest": world_digest(),
        **made,
    }
    write_json(folder / "quality.json", quality)
    return write_card(folder)


def _bars(rates: dict[str, Any], hazards: list[str]) -> list[tuple[str, dict[str, Any], str, bool]]:
    lines = [
        (f"{name} right", rates[name], f"≥ {100 * bar:.0f}%", rates[name]["mean"] >= bar) for name, bar in BAR.items()
    ]
    for hazard in hazards:
        asked, pooled = rates[f"{hazard} asked, pair routes"], rates[f"{hazard} asked, all routes"]
        routes = {k: v for k, v in rates.items() if k.startswith(f"{hazard} asked: ")}
        worst = min(routes, key=lambda route: routes[route]["mean"])
        lines += [
            (f"{hazard} there when asked, pair routes", asked, f"≥ {100 * ASKED:.0f}%", asked["mean"] >= ASKED),
            (f"{hazard} there when asked, all routes", pooled, f"≥ {100 * POOLED:.0f}%", pooled["mean"] >= POOLED),
            (
                f"the worst route, “{worst.removeprefix(f'{hazard} asked: ')}”",
                routes[worst],
                f"≥ {100 * ROUTE:.0f}%",
                routes[worst]["mean"] >= ROUTE,
            ),
        ]
    for hazard in HAZARDS:
        value = rates[f"{hazard} unasked"]
        lines.append((f"{hazard} there when not asked", value, f"≤ {100 * UNASKED:.0f}%", value["mean"] <= UNASKED))
    return lines
