"""SDXL against diffusers' own pipelines, on a tiny model of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from duo.delta import Delta
from duo.errors import UserError
from duo.families.sdxl import Sdxl
from duo.models import load_family
from duo.plugins import Sampling
from duo.training import attach_lora
from tiny_unet import sdxl_pipeline

PROMPTS = ["a red house on fire", "a blue boat"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
SAME = {"num_inference_steps": 3, "guidance_scale": 3.0}


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def theirs(vocabulary: Path) -> Any:
    return sdxl_pipeline(vocabulary)


@pytest.fixture
def seen(tiny_sdxl: Any) -> list[dict[str, Any]]:
    """What the U-Net of `tiny_sdxl` was called with."""
    calls: list[dict[str, Any]] = []

    def note(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append({"x_t": arguments[0], "t": arguments[1], **named})

    tiny_sdxl.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("negative", [None, ["the beach", ""]])
def test_generate_equals_diffusers_given_the_prompts(tiny_sdxl: Any, theirs: Any, negative: list[str] | None) -> None:
    ours = pixels(tiny_sdxl.generate(PROMPTS, seeds=[3, 4], sampling=SHORT, negative_prompts=negative))
    wanted = pixels(theirs(PROMPTS, negative_prompt=negative, generator=generators(3, 4), **SAME).images)
    assert np.abs(ours - wanted).max() <= 1
    assert np.abs(ours[0] - ours[1]).max() > 1


def test_no_negative_prompt_is_zeros_unless_the_model_says_otherwise(
    tiny_sdxl: Any, vocabulary: Path, seen: list[dict[str, Any]]
) -> None:
    tiny_sdxl.generate(["a car"], seeds=[0], sampling=SHORT)
    assert seen[0]["encoder_hidden_states"][0].abs().max() == 0  # row 0 is the unconditional one
    assert seen[0]["added_cond_kwargs"]["text_embeds"][0].abs().max() == 0
    torch.testing.assert_close(seen[0]["encoder_hidden_states"][1:], tiny_sdxl.text(["a car"]).embeds)
    empty = tiny_sdxl.text([""])
    assert min(empty.embeds.abs().max(), empty.pooled.abs().max()) > 0
    assert tiny_sdxl.unconditional().pooled.abs().max() == 0
    encoding = Sdxl(sdxl_pipeline(vocabulary, force_zeros=False), name="tiny")
    torch.testing.assert_close(encoding.unconditional().embeds, empty.embeds)
    wanted = sdxl_pipeline(vocabulary, force_zeros=False)(PROMPTS, generator=generators(3, 4), **SAME).images
    assert np.abs(pixels(encoding.generate(PROMPTS, seeds=[3, 4], sampling=SHORT)) - pixels(wanted)).max() <= 1


@pytest.mark.parametrize("negative", [None, ["the beach", ""]])
def test_edit_equals_diffusers_given_the_prompts(tiny_sdxl: Any, theirs: Any, negative: list[str] | None) -> None:
    images = [picture(0), picture(1)]
    ours = tiny_sdxl.edit(images, PROMPTS, strength=0.7, seeds=[3, 4], sampling=SHORT, negative_prompts=negative)
    parts = {**theirs.components, "add_watermarker": False}
    pipeline = StableDiffusionXLImg2ImgPipeline(**parts)
    wanted = pipeline(
        PROMPTS, negative_prompt=negative, image=images, strength=0.7, generator=generators(3, 4), **SAME
    ).images
    assert np.abs(pixels(ours) - pixels(wanted)).max() <= 1
    assert np.abs(pixels(ours) - pixels(images)).max() > 1


def test_predict_equals_the_denoiser_within_the_pipeline(tiny_sdxl: Any, theirs: Any) -> None:
    """With its pooled embedding and its six sizes, of an image that is not square."""
    calls: list[Any] = []
    theirs.unet.register_forward_hook(lambda _m, a, named, out: calls.append((*a, named, out[0])), with_kwargs=True)
    theirs("a car", height=48, width=80, guidance_scale=1.0, num_inference_steps=1, generator=generators(0))
    x_t, t, named, wanted = calls[0]
    assert x_t.shape == (1, 4, 12, 20)
    assert named["added_cond_kwargs"]["time_ids"].tolist() == [[48, 80, 0, 0, 48, 80]]
    text = tiny_sdxl.text(["a car"])
    torch.testing.assert_close(tiny_sdxl.predict(x_t, t[None], text), wanted)
    # Half the width and both conditions matter, or the comparison would say nothing.
    assert not torch.allclose(tiny_sdxl.predict(x_t, t[None], tiny_sdxl.unconditional()), wanted, atol=1e-3)
    assert not torch.allclose(tiny_sdxl.predict(x_t[..., :10], t[None], text), wanted[..., :10], atol=1e-3)
    with pytest.raises(ValueError, match="needs the pooled embedding"):
        tiny_sdxl.predict(x_t, t[None], type(text)(embeds=text.embeds))


def test_text_equals_the_pipelines(tiny_sdxl: Any, theirs: Any) -> None:
    prompts = [*PROMPTS, "", "a red house " * 30]
    embeds, _, pooled, _ = theirs.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    ours = tiny_sdxl.text(prompts)
    torch.testing.assert_close(ours.embeds, embeds)
    torch.testing.assert_close(ours.pooled, pooled)
    assert ours.embeds.shape == (4, 24, 40) and ours.pooled.shape == (4, 24)


@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_tokens_equal_textual_inversions_of_both_encoders(tiny_sdxl: Any, theirs: Any, vectors: int) -> None:
    learned = torch.randn(vectors, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of <thing> on the beach", "<thing>", "a red car"]
    ours = tiny_sdxl.text(prompts, tokens={"<thing>": learned})
    for part, number in ((learned[:, :16], ""), (learned[:, 16:], "_2")):
        encoder, tokenizer = (getattr(theirs, f"{kind}{number}") for kind in ("text_encoder", "tokenizer"))
        theirs.load_textual_inversion(
            {"<thing>": part.clone()}, token="<thing>", text_encoder=encoder, tokenizer=tokenizer
        )
    embeds, _, pooled, _ = theirs.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours.embeds, embeds)
    torch.testing.assert_close(ours.pooled, pooled)


def test_learned_tokens_are_differentiable_in_both_halves(tiny_sdxl: Any) -> None:
    learned = torch.zeros(2, 40, requires_grad=True)
    text = tiny_sdxl.text(["a photo of sks"], tokens={"sks": learned})
    text.embeds.square().sum().backward()
    assert learned.grad is not None
    assert learned.grad[:, :16].abs().sum(1).min() > 0 and learned.grad[:, 16:].abs().sum(1).min() > 0
    assert not any(encoder.get_input_embeddings()._forward_hooks for encoder in tiny_sdxl._encoders)
    with pytest.raises(UserError, match=r"'sks' has width 16, expected 16 \+ 24"):
        tiny_sdxl.text(["sks"], tokens={"sks": torch.zeros(1, 16)})


def test_a_word_of_the_vocabulary_is_its_own_learned_token(tiny_sdxl: Any) -> None:
    (row,) = tiny_sdxl.tokenizer()("red", add_special_tokens=False).input_ids
    table = tiny_sdxl.token_embeddings()
    assert table.shape == (len(tiny_sdxl.tokenizer()), 40)
    ours = tiny_sdxl.text(["a <x> house"], tokens={"<x>": table[row : row + 1]})
    torch.testing.assert_close(ours.embeds, tiny_sdxl.text(["a red house"]).embeds)
    torch.testing.assert_close(ours.pooled, tiny_sdxl.text(["a red house"]).pooled)


def test_two_vocabularies_share_no_learned_word(tiny_sdxl: Any) -> None:
    tiny_sdxl._tokenizers[1].add_tokens(["<extra>"])
    with pytest.raises(UserError, match="two tokenizers have different vocabularies"):
        tiny_sdxl.token_embeddings()


def test_ids_are_encoded_as_their_prompt(tiny_sdxl: Any) -> None:
    prompts = [*PROMPTS, ""]
    ids = tiny_sdxl.tokenizer()(prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids
    torch.testing.assert_close(tiny_sdxl.encode_ids(ids), tiny_sdxl.text(prompts).embeds)


def test_latents_are_the_scaled_posterior(tiny_sdxl: Any, theirs: Any) -> None:
    x = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = theirs.vae.encode(x).latent_dist
    torch.testing.assert_close(tiny_sdxl.latents([picture(0)], generator=None), posterior.mean * 0.13025)
    sampled = tiny_sdxl.latents([picture(0)], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, posterior.sample(torch.Generator().manual_seed(1)) * 0.13025)
    with pytest.raises(UserError, match="different sizes, 32×32 and 64×64"):
        tiny_sdxl.latents([picture(0), picture(1).resize((32, 32))], generator=None)


def test_the_process_is_the_schedulers(tiny_sdxl: Any) -> None:
    scheduler = DDIMScheduler.from_config(tiny_sdxl._scheduler.config)
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 999])
    torch.testing.assert_close(tiny_sdxl.process.noised(x0, eps, t), scheduler.add_noise(x0, eps, t))
    assert tiny_sdxl.process.target(x0, eps, t) is eps


def test_scopes_hold_the_transformers_of_every_depth(tiny_sdxl: Any) -> None:
    own, cross = (set(tiny_sdxl.layers(f"{kind}_attention")) for kind in ("self", "cross"))
    blocks = sum(name.endswith("attn1") for name, _ in tiny_sdxl.denoiser.named_modules())
    assert len(own) == len(cross) == 4 * blocks
    assert "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0" in own
    assert own | cross == set(tiny_sdxl.layers("attention"))
    assert {"add_embedding.linear_1", "conv_in"} <= set(tiny_sdxl.layers("all")) - own - cross


def test_a_lora_is_one_that_diffusers_loads(tiny_sdxl: Any, theirs: Any, tmp_path: Path) -> None:
    layers = sorted(tiny_sdxl.layers("self_attention"))
    with attach_lora(tiny_sdxl.denoiser, layers, rank=2, alpha=2.0, seed=0) as lora:
        for parameter in lora.parameters:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        tensors = lora.tensors()
    delta = Delta(kind="lora", component="unet", tensors=tensors, record={})
    delta.save(tmp_path / "delta.safetensors")
    plain = pixels(tiny_sdxl.generate(PROMPTS, seeds=[3, 4], sampling=SHORT))
    with delta.attached(tiny_sdxl):
        attached = pixels(tiny_sdxl.generate(PROMPTS, seeds=[3, 4], sampling=SHORT))
    theirs.load_lora_weights(tmp_path / "delta.safetensors")
    wanted = pixels(theirs(PROMPTS, generator=generators(3, 4), **SAME).images)
    assert np.abs(attached - wanted).max() <= 1
    assert np.abs(attached - plain).max() > 1


def test_a_merged_model_is_saved_whole(tiny_sdxl: Any, tmp_path: Path) -> None:
    name = next(iter(tiny_sdxl.layers("self_attention")))
    out, into = tiny_sdxl.layers("all")[name].weight.shape
    before = tiny_sdxl.layers("all")[name].weight.clone()
    tensors = {f"{name}.lora_A.weight": torch.ones(1, into), f"{name}.lora_B.weight": torch.ones(out, 1)}
    Delta(kind="lora", component="unet", tensors=tensors, record={}).merge(tiny_sdxl)
    tiny_sdxl.save(tmp_path / "merged")
    loaded = load_family(str(tmp_path / "merged"))
    assert isinstance(loaded, Sdxl)
    torch.testing.assert_close(loaded.layers("all")[name].weight, before + 1)
    ours, merged = (model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT) for model in (tiny_sdxl, loaded))
    assert np.abs(pixels(ours) - pixels(merged)).max() <= 1
    assert not list(tmp_path.rglob("*.bin"))


def test_all_weights_are_frozen_and_evaluating(tiny_sdxl: Any) -> None:
    for module in (tiny_sdxl.denoiser, tiny_sdxl._vae, *tiny_sdxl._encoders):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
