from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline

import tiny_flow
from duo.errors import UserError
from duo.families.sd3 import Sd3
from duo.models import load_family
from duo.plugins import Sampling
from tiny_flow import first_call, generators, picture, pixels

PROMPTS = ["a red house on fire", "a blue boat"]
NEGATIVE = ["the beach", "a car"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
PLAIN = Sampling(num_inference_steps=4, guidance_scale=1.0)
CLIP = 16 + 24  # widths of the two encoders


@pytest.fixture(scope="session")
def sd3_folder(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder. Read only."""
    folder = tmp_path_factory.mktemp("model") / "sd3"
    tiny_flow.sd3_pipeline(vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture
def sd3(vocabulary: Path) -> Sd3:
    return Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")


@pytest.mark.parametrize("with_t5", [True, False])
def test_text_and_generate_equal_diffusers_given_the_prompts(vocabulary: Path, with_t5: bool) -> None:
    pipeline = tiny_flow.sd3_pipeline(vocabulary, with_t5=with_t5)
    ours = Sd3(tiny_flow.sd3_pipeline(vocabulary, with_t5=with_t5), name="tiny")
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        PROMPTS, None, None, device="cpu", negative_prompt=NEGATIVE
    )
    for prompts, wanted, wanted_pooled in ((PROMPTS, embeds, pooled), (NEGATIVE, negative, negative_pooled)):
        text = ours.text(prompts)
        torch.testing.assert_close(text.embeds, wanted)
        torch.testing.assert_close(text.pooled, wanted_pooled)
    assert bool(embeds[:, tiny_flow.LENGTH :].any()) == with_t5
    images = ours.generate(PROMPTS, seeds=[3, 4], sampling=SHORT, negative_prompts=NEGATIVE)
    theirs = pipeline(
        PROMPTS, negative_prompt=NEGATIVE, generator=generators(3, 4), num_inference_steps=3, guidance_scale=3.0
    ).images
    assert np.abs(pixels(images) - pixels(theirs)).max() <= 1
    assert np.abs(pixels(images)[0] - pixels(images)[1]).max() > 1
    assert images[0].size == (32, 32)
    without = ours.generate(PROMPTS, seeds=[3, 4], sampling=SHORT)
    assert np.abs(pixels(images) - pixels(without)).max() > 0


def test_edit_equals_diffusers_given_the_prompts(sd3: Sd3, vocabulary: Path) -> None:
    images = [picture(0), picture(1)]
    ours = sd3.edit(images, PROMPTS, strength=0.5, seeds=[3, 4], sampling=SHORT, negative_prompts=NEGATIVE)
    pipeline = StableDiffusion3Img2ImgPipeline(**tiny_flow.sd3_pipeline(vocabulary).components)
    theirs = pipeline(
        PROMPTS,
        image=images,
        negative_prompt=NEGATIVE,
        strength=0.5,
        generator=generators(3, 4),
        num_inference_steps=3,
        guidance_scale=3.0,
    ).images
    assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1


def test_the_terminal_point_is_the_samplers_first_call(sd3: Sd3) -> None:
    given = first_call(sd3, lambda: sd3.generate(PROMPTS, seeds=[3, 4], sampling=PLAIN))
    eps = torch.cat([torch.randn(1, 8, 8, 8, generator=generator) for generator in generators(3, 4)])
    x_t, t = sd3.process.terminal(eps)
    ours = first_call(sd3, lambda: sd3.predict(x_t, t, sd3.text(PROMPTS)))
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
        torch.testing.assert_close(ours[name], given[name])
    assert given["timestep"].tolist() == [1000.0, 1000.0]


def test_strength_is_a_share_of_the_schedule(sd3: Sd3) -> None:
    given = first_call(
        sd3, lambda: sd3.edit([picture(0)], ["a"], strength=0.5, seeds=[3], sampling=Sampling(num_inference_steps=100))
    )
    # diffusers shifts a schedule whose ends are shifted already, so its steps are not quite the 100ths of it.
    assert given["timestep"][0].item() / 1000 == pytest.approx(sd3.process.sigma(torch.tensor(0.5)).item(), abs=3e-3)


def test_predict_equals_the_transformer_called_by_hand(sd3: Sd3, vocabulary: Path) -> None:
    pipeline = tiny_flow.sd3_pipeline(vocabulary)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, device="cpu")
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.8])
    with torch.no_grad():
        wanted = pipeline.transformer.eval()(x_t, embeds, pooled, torch.tensor([250.0, 800.0])).sample
        ours = sd3.predict(x_t, t, sd3.text(PROMPTS))
        torch.testing.assert_close(ours, wanted)
        assert not torch.allclose(sd3.predict(x_t, 1 - t, sd3.text(PROMPTS)), wanted)
        assert sd3.predict(x_t.double(), t, sd3.text(PROMPTS)).dtype == torch.float64


def test_layers_by_scope(sd3: Sd3) -> None:
    own = {f"transformer_blocks.{block}.{attn}.{part}" for block, attn in ((0, "attn"), (0, "attn2"), (1, "attn"))
           for part in ("to_q", "to_k", "to_v", "to_out.0")}  # fmt: skip
    assert set(sd3.layers("self_attention")) == own
    added = {f"transformer_blocks.{block}.attn.add_{part}_proj" for block in (0, 1) for part in "qkv"}
    added.add("transformer_blocks.0.attn.to_add_out")  # the last block has no text output
    assert set(sd3.layers("joint_attention")) == added
    assert set(sd3.layers("attention")) == own | added
    assert set(sd3.layers("text_inputs")) == {"context_embedder", "time_text_embed.text_embedder.linear_1"}
    assert len(sd3.layers("feed_forward")) == 2 * 3
    assert {"pos_embed.proj", "proj_out", *own, *added} <= set(sd3.layers("all"))
    with pytest.raises(UserError, match="no layer scope is called 'cross_attention'"):
        sd3.layers("cross_attention")


def test_ids_are_encoded_as_their_prompt(sd3: Sd3) -> None:
    ids = sd3.tokenizer()(PROMPTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(sd3.encode_ids(ids), sd3.text(PROMPTS).embeds[:, :24, :CLIP])


def test_a_folder_is_loaded_with_and_without_t5(sd3_folder: Path, vocabulary: Path, tmp_path: Path) -> None:
    model: Any = load_family(str(sd3_folder))
    assert isinstance(model, Sd3)
    assert not any(one.requires_grad for part in (model.denoiser, model._t5[1]) for one in part.parameters())
    tiny_flow.sd3_pipeline(vocabulary, with_t5=False).save_pretrained(tmp_path / "small")
    small = load_family(str(tmp_path / "small"))
    plain = Sd3(tiny_flow.sd3_pipeline(vocabulary, with_t5=False), name="tiny")
    torch.testing.assert_close(small.text(PROMPTS).embeds, plain.text(PROMPTS).embeds)
    small.save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "model_index.json").read_text())["text_encoder_3"] == [None, None]


def test_sampling_is_the_models_own(sd3: Sd3) -> None:
    with pytest.raises(UserError, match="scheduler = 'DDIMScheduler' does not fit model 'tiny'"):
        sd3.generate(["a"], seeds=[0], sampling=Sampling(scheduler="DDIMScheduler"))


def test_images_beyond_the_position_table_are_refused(sd3: Sd3) -> None:
    side = 12 * 8  # patches of the table, and pixels of a patch
    for size in ((side, side), (side + 7, side), (8, 8)):
        sd3.check(Sampling(), size=size)
    for size in ((side + 8, 8), (8, side + 8)):
        with pytest.raises(UserError, match=f"is too large for model 'tiny'; it takes at most {side} a side"):
            sd3.check(Sampling(), size=size)
    with pytest.raises(UserError, match="9×7 is too small"):
        sd3.check(Sampling(), size=(9, 7))
