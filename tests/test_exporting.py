"""`duo export`: diffusers' own converters read what is written, and draw what the delta draws."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_flow
import tiny_unet
from duo.delta import Delta
from duo.errors import UserError
from duo.exporting import export
from duo.families import flux, sd, sd3, sdxl

# The published choice, and all that sd-scripts may train but FLUX's layers outside its blocks.
EVERYTHING = "all"


def delta_of(model: Any, names: Any, *, rank: int = 2) -> Delta:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for number, name in enumerate(sorted(names)):
        weight = dict(model.denoiser.named_modules())[name].weight
        own = rank + number % 2  # ranks that differ, as composing makes them
        down = torch.randn(own, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), own, *[1] * (weight.dim() - 2), generator=generator)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": 0.05 * up}
    return Delta(kind="lora", component=model.component, tensors=tensors, record={"model": model.name})


def drawn(model: Any) -> Any:
    from duo.plugins import Sampling

    short = Sampling(num_inference_steps=2, guidance_scale=3.0)
    return tiny_flow.pixels(model.generate(["a red house", "a boat"], seeds=[1, 2], sampling=short))


def saved(pipeline: Any, folder: Path) -> str:
    pipeline.save_pretrained(folder)
    return str(folder)


def exported(delta: Delta, folder: Path, to: str = "kohya") -> dict[str, torch.Tensor]:
    delta.save(folder / "delta.safetensors")
    export(folder / "delta.safetensors", folder / "out.safetensors", to=to)
    return load_file(folder / "out.safetensors")


def check(family: type, make: Any, delta_layers: Any, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Export, load through diffusers, and compare images; the file's tensors are returned."""
    model = family(make(), name=saved(make(), tmp_path / "model"))
    delta = delta_of(model, delta_layers(model))
    tensors = exported(delta, tmp_path)
    loaded = make()
    loaded.load_lora_weights(tmp_path, weight_name="out.safetensors")
    plain = drawn(model)
    with delta.attached(model):
        ours = drawn(model)
    assert abs(ours - drawn(family(loaded, name="loaded"))).max() <= 1
    assert abs(ours - plain).max() > 8
    return tensors


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_kohya_of_sd(version: str, make_tiny_pipeline: Any, vocabulary: Path, tmp_path: Path) -> None:
    make = make_tiny_pipeline if version == "sd1" else lambda: tiny_unet.sd2_v_pipeline(vocabulary)
    tensors = check(sd.Sd, make, lambda model: model.layers(EVERYTHING), tmp_path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= tensors.keys()
    assert tensors[f"{layer}.alpha"] == len(tensors[f"{layer}.lora_down.weight"])
    assert all(re.fullmatch(r"lora_unet_\w+\.(alpha|lora_(down|up)\.weight)", key) for key in tensors)


@pytest.mark.parametrize("per_block", [1, 2])
def test_kohya_of_sdxl_has_the_names_of_stabilitys_network(per_block: int, vocabulary: Path, tmp_path: Path) -> None:
    def make() -> Any:
        pipeline = tiny_unet.sdxl_pipeline(vocabulary)
        if per_block == 2:
            config = dict(pipeline.unet.config) | {"layers_per_block": 2}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipeline.unet = type(pipeline.unet).from_config(config)
        return pipeline

    tensors = check(sdxl.Sdxl, make, lambda model: model.layers(EVERYTHING), tmp_path)
    # The first attention lies in the second level: after the input, a level's layers and its downsampler.
    first = f"lora_unet_input_blocks_{1 + per_block + 1}_1_transformer_blocks_0_attn1_to_q.alpha"
    assert first in tensors
    assert "lora_unet_middle_block_1_proj_in.lora_up.weight" in tensors
    assert f"lora_unet_output_blocks_{per_block}_2_conv.lora_down.weight" in tensors
    assert not [key for key in tensors if "down_blocks" in key or "up_blocks" in key]


def test_the_names_of_sdxl_itself() -> None:
    """Against keys of published SDXL LoRAs."""
    known = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
        ),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block_1_transformer_blocks_0_attn2_to_k",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_v": "output_blocks_2_1_transformer_blocks_0_attn1_to_v",
        "up_blocks.1.attentions.0.proj_in": "output_blocks_3_1_proj_in",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    }
    found = {layer: sdxl.Sdxl.kohya(layer, {"layers_per_block": 2}) for layer in known}
    assert {layer: place.module for layer, place in found.items() if place} == known
    assert sdxl.Sdxl.kohya("mid_block.resnets.0.norm1", {}) is None


def test_kohya_of_flux_stacks_queries_keys_and_values(vocabulary: Path, tmp_path: Path) -> None:
    def layers(model: Any) -> list[str]:
        every = [*model.layers("attention"), *model.layers("feed_forward")]
        # Diffusers cuts `linear1` at the widths of FLUX itself (below), and to_k is left out to be filled up.
        return [name for name in every if re.match(r"transformer_blocks|.*proj_out", name) and "attn.to_k" not in name]

    tensors = check(flux.Flux, lambda: tiny_flow.flux_pipeline(vocabulary), layers, tmp_path)
    stacked = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    rank = stacked.shape[1] // 3
    assert stacked.shape[0] == 3 * 32
    assert not stacked[32:64].any() and not stacked[:32, rank:].any() and stacked[:32].any() and stacked[64:].any()
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 3 * rank
    assert "lora_unet_single_blocks_0_linear2.lora_down.weight" in tensors


def test_kohya_of_fluxs_single_blocks_at_their_own_widths(vocabulary: Path, tmp_path: Path) -> None:
    """Diffusers' converter knows 3072 and 12288 alone, so the tensors are compared, and no images."""
    folder = saved(tiny_flow.flux_pipeline(vocabulary), tmp_path / "model")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, width in {"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}.items():
        name = f"single_transformer_blocks.0.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(1, 3072, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 1, generator=generator)
    delta = Delta(kind="lora", component="transformer", tensors=tensors, record={"model": folder})
    exported(delta, tmp_path)
    read = tiny_flow.flux_pipeline(vocabulary).lora_state_dict(tmp_path, weight_name="out.safetensors")
    read = read[0] if isinstance(read, tuple) else read
    for name, tensor in tensors.items():
        assert torch.equal(read[f"transformer.{name}"], tensor)
    assert not read["transformer.single_transformer_blocks.0.attn.to_k.lora_B.weight"].any()


def test_kohya_is_refused_where_it_has_no_names(vocabulary: Path, tmp_path: Path) -> None:
    for family, make, scope in (
        (sd3.Sd3, tiny_flow.sd3_pipeline, "self_attention"),
        (flux.Flux, tiny_flow.flux_pipeline, "text_inputs"),
    ):
        folder = tmp_path / family.__name__
        model = family(make(vocabulary), name=saved(make(vocabulary), folder))
        delta_of(model, model.layers(scope)).save(folder / "delta.safetensors")
        with pytest.raises(UserError, match=r"not defined for layer .*export with --format diffusers"):
            export(folder / "delta.safetensors", folder / "out.safetensors", to="kohya")
        assert not (folder / "out.safetensors").exists()


def test_diffusers_format_is_a_delta_again_and_weights_are_applied(tiny_sd: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "delta.safetensors", tmp_path / "out.safetensors"
    delta = delta_of(tiny_sd, tiny_sd.layers("self_attention"))
    delta.save(path)
    again = tmp_path / "again.safetensors"
    replace(delta, record={**delta.record, "seed": 1}).save(again)  # another erasure, whose tensors are known
    export([path, again], out, weights=[0.25, 0.5])
    name = delta.layers()[0]
    (a, b), (down, up) = delta.factors(name), Delta.load(out).factors(name)
    torch.testing.assert_close(up @ down, 0.75 * b @ a)


def test_bad_requests_are_one_line(tiny_sd: Any, tmp_path: Path) -> None:
    path = tmp_path / "delta.safetensors"
    delta_of(tiny_sd, tiny_sd.layers("self_attention")).save(path)
    for arguments, settings, message in (
        ((path, path), {}, "exists already"),
        ((path, tmp_path / "lora.bin"), {}, "must end in .safetensors"),
        ((path, tmp_path / "x.safetensors"), {"to": "a1111"}, "format is 'a1111', expected diffusers or kohya"),
        ((tmp_path / "no", tmp_path / "x.safetensors"), {}, "neither a run folder nor a delta file"),
        ((path, tmp_path / "x.safetensors"), {"to": "kohya"}, "no model is called 'tiny'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            export(*arguments, **settings)
        assert "\n" not in str(caught.value)
