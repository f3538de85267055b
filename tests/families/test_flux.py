from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline

import tiny_flow
from duo.families.flux import GUIDANCE, Flux
from duo.plugins import Sampling
from tiny_flow import first_call, generators, picture, pixels

PROMPTS = ["a red house on fire", "a blue boat"]
NEGATIVE = ["the beach", "a car"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
SIZE: dict[str, Any] = {"height": 32, "width": 32}


@pytest.fixture
def flux(vocabulary: Path) -> Flux:
    return Flux(tiny_flow.flux_pipeline(vocabulary), name="tiny")


@pytest.mark.parametrize(("dev", "length"), [(True, 512), (False, 256)])
def test_text_and_generate_equal_diffusers_given_the_prompts(vocabulary: Path, dev: bool, length: int) -> None:
    pipeline = tiny_flow.flux_pipeline(vocabulary, dev=dev)
    ours = Flux(tiny_flow.flux_pipeline(vocabulary, dev=dev), name="tiny")
    embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=length)
    text = ours.text(PROMPTS)
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-4)  # they encode in a batch, we one by one
    torch.testing.assert_close(text.pooled, pooled)
    images = ours.generate(PROMPTS, seeds=[3, 4], sampling=SHORT)
    theirs = pipeline(
        PROMPTS,
        generator=generators(3, 4),
        num_inference_steps=3,
        guidance_scale=3.0,
        max_sequence_length=length,
        **SIZE,
    ).images
    assert np.abs(pixels(images) - pixels(theirs)).max() <= 1
    assert np.abs(pixels(images)[0] - pixels(images)[1]).max() > 1
    assert images[0].size == (32, 32)


def test_edit_equals_diffusers_given_the_prompts(flux: Flux, vocabulary: Path) -> None:
    images = [picture(0), picture(1)]
    ours = flux.edit(images, PROMPTS, strength=0.5, seeds=[3, 4], sampling=SHORT)
    components = tiny_flow.flux_pipeline(vocabulary).components
    theirs = FluxImg2ImgPipeline(**components)(
        PROMPTS,
        image=images,
        strength=0.5,
        generator=generators(3, 4),
        num_inference_steps=3,
        guidance_scale=3.0,
        **SIZE,
    ).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


@pytest.mark.parametrize("edit", [False, True])
def test_a_negative_prompt_is_true_guidance_and_of_its_own_row_alone(flux: Flux, vocabulary: Path, edit: bool) -> None:
    kind, more = (FluxImg2ImgPipeline, {"image": picture(0), "strength": 0.5}) if edit else (FluxPipeline, {})
    pipeline = kind(**tiny_flow.flux_pipeline(vocabulary).components)
    alone: dict[str, Any] = {"num_inference_steps": 3, **SIZE, **more}
    negative = {"negative_prompt": "the beach", "true_cfg_scale": 3.0, "guidance_scale": 1.0}
    theirs = [
        pipeline(PROMPTS[0], generator=generators(3)[0], **negative, **alone).images[0],
        pipeline(PROMPTS[1], generator=generators(4)[0], guidance_scale=3.0, **alone).images[0],
    ]
    rows: dict[str, Any] = {"seeds": [3, 4], "sampling": SHORT, "negative_prompts": ["the beach", ""]}
    ours = flux.edit([picture(0)] * 2, PROMPTS, strength=0.5, **rows) if edit else flux.generate(PROMPTS, **rows)
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
    rows = {"seeds": [3], "sampling": SHORT}
    one = PROMPTS[:1]
    without = flux.edit([picture(0)], one, strength=0.5, **rows) if edit else flux.generate(one, **rows)
    assert np.abs(pixels(ours)[:1] - pixels(without)).max() > 0


def test_schnell_has_no_guidance(vocabulary: Path) -> None:
    schnell = Flux(tiny_flow.flux_pipeline(vocabulary, dev=False), name="tiny")
    assert schnell.process.shift == 1.0
    low, high = (
        schnell.generate(PROMPTS, seeds=[1, 2], sampling=Sampling(num_inference_steps=2, guidance_scale=scale))
        for scale in (1.0, 7.0)
    )
    assert np.abs(pixels(low) - pixels(high)).max() == 0


@pytest.mark.parametrize("dev", [True, False])
def test_the_terminal_point_is_the_samplers_first_call(vocabulary: Path, dev: bool) -> None:
    """So `predict` packs, places and guides as the sampler does."""
    model = Flux(tiny_flow.flux_pipeline(vocabulary, dev=dev), name="tiny")
    sampling = Sampling(num_inference_steps=2, guidance_scale=GUIDANCE)
    given = first_call(model, lambda: model.generate(PROMPTS, seeds=[3, 4], sampling=sampling))
    eps = torch.cat([torch.randn(1, 8, 8, 8, generator=generator) for generator in generators(3, 4)])
    x_t, t = model.process.terminal(eps)
    ours = first_call(model, lambda: model.predict(x_t, t, model.text(PROMPTS)))
    named = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")
    for name in (*named, *(["guidance"] if dev else [])):
        torch.testing.assert_close(ours[name], given[name])
    assert given["timestep"].tolist() == [1.0, 1.0]
    assert (given["guidance"] is None) == (ours["guidance"] is None) == (not dev)


@pytest.mark.parametrize(("dev", "shift"), [(True, math.exp(0.5 - 240 * 0.65 / 3840)), (False, 1.0)])
def test_strength_is_a_share_of_the_schedule(vocabulary: Path, dev: bool, shift: float) -> None:
    model = Flux(tiny_flow.flux_pipeline(vocabulary, dev=dev), name="tiny")  # 16 image tokens
    sampling = Sampling(num_inference_steps=4)
    given = first_call(model, lambda: model.edit([picture(0)], ["a"], strength=0.5, seeds=[3], sampling=sampling))
    assert given["timestep"].item() == pytest.approx(shift / (1 + shift), abs=1e-5)
    assert model.process.sigma(torch.tensor(0.5)).item() == pytest.approx(shift / (1 + shift), abs=1e-5)


@pytest.mark.parametrize("dev", [True, False])
def test_predict_equals_the_transformer_called_by_hand(vocabulary: Path, dev: bool) -> None:
    pipeline = tiny_flow.flux_pipeline(vocabulary, dev=dev)
    model = Flux(tiny_flow.flux_pipeline(vocabulary, dev=dev), name="tiny")
    embeds, pooled, text_ids = pipeline.encode_prompt(PROMPTS, device="cpu", max_sequence_length=512 if dev else 256)
    x_t = torch.randn(2, 8, 8, 12, generator=torch.Generator().manual_seed(0))  # not a square
    t = torch.tensor([0.25, 0.8])
    with torch.no_grad():
        packed = pipeline.transformer.eval()(
            hidden_states=pipeline._pack_latents(x_t, 2, 8, 8, 12),
            timestep=t,
            guidance=torch.tensor([3.5, 3.5]) if dev else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=pipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
        ).sample
        wanted = pipeline._unpack_latents(packed, 32, 48, 4)
        torch.testing.assert_close(model.predict(x_t, t, model.text(PROMPTS)), wanted)
        assert not torch.allclose(model.predict(x_t, 1 - t, model.text(PROMPTS)), wanted)


def test_layers_by_scope(flux: Flux) -> None:
    own = {f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    own |= {f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    assert set(flux.layers("self_attention")) == own
    added = {f"transformer_blocks.0.attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    assert set(flux.layers("joint_attention")) == added
    assert set(flux.layers("attention")) == own | added
    forward = {f"transformer_blocks.0.{net}.net.{part}" for net in ("ff", "ff_context") for part in ("0.proj", "2")}
    forward |= {f"single_transformer_blocks.0.proj_{part}" for part in ("mlp", "out")}
    assert set(flux.layers("feed_forward")) == forward
    assert set(flux.layers("text_inputs")) == {"context_embedder", "time_text_embed.text_embedder.linear_1"}
    assert {"x_embedder", "proj_out", *own, *added, *forward} <= set(flux.layers("all"))


def test_ids_are_encoded_by_clip(flux: Flux) -> None:
    ids = flux.tokenizer()(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    ends = (ids == flux.tokenizer().eos_token_id).int().argmax(dim=1)
    torch.testing.assert_close(flux.encode_ids(ids)[torch.arange(2), ends], flux.text(PROMPTS).pooled)
