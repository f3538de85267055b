"""Facilitated transport: how far each prompt opens each adapter, and that closed ones are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_flow
from duo.delta import Delta, compose
from duo.errors import UserError
from duo.gating import gate_of, strength
from duo.plugins import Sampling

SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)


def gated(model, concepts=("burning",), *, seed: int = 0, scopes=("transformers", "convolutions"), scale=0.05) -> Delta:
    """One adapter of rank 1 with random factors on the layers of `scopes`."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in sorted({k: m for scope in scopes for k, m in model.layers(scope).items()}.items()):
        weight = module.weight
        up = torch.randn(len(weight), 1, *[1] * (weight.dim() - 2), generator=generator)
        tensors[f"0.{name}.lora_A.weight"] = torch.randn(1, *weight.shape[1:], generator=generator)
        tensors[f"0.{name}.lora_B.weight"] = scale * up
    embeds, gate = gate_of(concepts, model)
    tensors["0.gate.embeds"] = embeds
    record = {"model": model.name, "method": "spm", "gates": [gate]}
    return Delta(kind="gated", component=model.component, tensors=tensors, record=record)


def as_lora(delta: Delta, gate: float = 1.0, adapter: int = 0) -> Delta:
    """An adapter as it acts where its gate stands at `gate`."""
    own = {k.partition(".")[2]: v for k, v in delta.tensors.items() if k.startswith(f"{adapter}.") and ".lora_" in k}
    tensors = {name: gate * tensor if ".lora_B" in name else tensor for name, tensor in own.items()}
    return Delta(kind="lora", component=delta.component, tensors=tensors, record=delta.record)


def predicted(model, prompt: str, delta: Delta | None = None) -> torch.Tensor:
    x_t = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    t = model.process.times(torch.tensor([0.6]))
    with torch.no_grad():
        if delta is None:
            return model.predict(x_t, t, model.text([prompt]))
        with delta.attached(model):
            return model.predict(x_t, t, model.text([prompt]))


def drawn(model, prompts, **given) -> np.ndarray:
    images = model.generate(prompts, seeds=list(range(len(prompts))), sampling=SHORT, **given)
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_strength_is_the_larger_of_cosine_and_shared_words() -> None:
    embeds = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])
    concepts = torch.tensor([[[1.0, 1.0]]])
    words = [frozenset({1, 2}), frozenset({2, 3, 4}), frozenset()]
    found = strength(embeds, words, concept_embeds=concepts, concept_words=[[3, 4, 5, 6]])
    # cosines √½, √½ and −√½ (no less than 0); of the concept's four words 0, 2 and 0 are shared
    torch.testing.assert_close(found, torch.tensor([0.5**0.5, 0.5**0.5, 0.0]))
    found = strength(embeds, words, concept_embeds=concepts, concept_words=[[2, 3, 4, 5]])
    torch.testing.assert_close(found, torch.tensor([0.5**0.5, 0.75, 0.0]))
    assert strength(embeds, None, concept_embeds=concepts, concept_words=[[3]])[1] == pytest.approx(0.5**0.5)


def test_the_concept_itself_opens_the_gate_wholly(tiny_sd) -> None:
    delta = gated(tiny_sd)
    whole = predicted(tiny_sd, "burning", delta)
    torch.testing.assert_close(whole, predicted(tiny_sd, "burning", as_lora(delta)), atol=1e-5, rtol=1e-5)
    assert (whole - predicted(tiny_sd, "burning")).abs().max() > 1e-2


def test_another_prompt_opens_it_as_far_as_it_resembles(tiny_sd) -> None:
    delta = gated(tiny_sd)
    gate = delta.record["gates"][0]
    words = [frozenset(tiny_sd.tokenizer()("a boat", add_special_tokens=False).input_ids)]
    ids = gate["token_ids"]
    embeds = tiny_sd.text(["a boat"]).embeds
    opened = strength(embeds, words, concept_embeds=delta.tensors["0.gate.embeds"], concept_words=ids).item()
    assert 0 < opened < 0.99
    wanted = predicted(tiny_sd, "a boat", as_lora(delta, opened))
    torch.testing.assert_close(predicted(tiny_sd, "a boat", delta), wanted, atol=1e-5, rtol=1e-5)


def test_images_of_every_family_follow_their_own_prompts(vocabulary, tiny_sd, tiny_sdxl) -> None:
    from duo.families.flux import Flux
    from duo.families.sd3 import Sd3

    sd3 = Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")
    flux = Flux(tiny_flow.flux_pipeline(vocabulary), name="tiny")
    for model, scale in ((tiny_sd, 0.05), (tiny_sdxl, 0.05), (sd3, 0.5), (flux, 0.5)):
        delta = gated(model, scopes=("transformers",), scale=scale)
        # Rows in one batch have the gates that they have alone, whatever the negative prompts are.
        prompts, negatives = ["burning", "a red house"], ["", "a boat"]
        with delta.attached(model):
            together = drawn(model, prompts, negative_prompts=negatives)
            alone = model.generate(["burning"], seeds=[0], sampling=SHORT, negative_prompts=[""])
        assert np.abs(together[0] - np.asarray(alone[0], dtype=np.int16)).max() <= 1
        with as_lora(delta).attached(model):
            whole = drawn(model, prompts, negative_prompts=negatives)
        assert np.abs(together[0] - whole[0]).max() <= 1
        assert np.abs(together[1] - whole[1]).max() > 1
        assert "generate" not in vars(model) and "predict" not in vars(model)


def test_latents_masks_and_tokens_go_to_their_own_rows(vocabulary, tiny_sd) -> None:
    from duo.families.flux import Flux

    flux = Flux(tiny_flow.flux_pipeline(vocabulary), name="tiny")
    prompts, negatives = ["burning", "a red <x>", "a boat"], ["", "a boat", ""]
    for model, scale in ((tiny_sd, 0.05), (flux, 0.5)):
        latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(2))
        images = [tiny_flow.picture(row) for row in range(3)]
        masks = [Image.new("L", (32, 32)) for _ in images]
        for row, mask in enumerate(masks):
            mask.paste(255, (0, 0, 8 + 8 * row, 32))
        tokens = {"<x>": torch.randn(1, model.token_embeddings().shape[1], generator=torch.Generator().manual_seed(1))}
        settings = {"seeds": [0, 1, 2], "negative_prompts": negatives, "sampling": SHORT, "tokens": tokens}
        with gated(model, scopes=("transformers",), scale=scale).attached(model):
            drawn = model.generate(prompts, latents=latents, **settings)
            edited = model.edit(images, prompts, strength=0.7, masks=masks, **settings)
            for row in (1, 2):  # one against a negative prompt, one after it
                own = {k: v[row : row + 1] if isinstance(v, list) else v for k, v in settings.items()}
                one = model.generate(prompts[row : row + 1], latents=latents[row : row + 1], **own)
                assert np.abs(tiny_flow.pixels(one)[0] - tiny_flow.pixels(drawn)[row]).max() <= 1
                row_of = {"strength": 0.7, "masks": masks[row : row + 1], **own}
                one = model.edit(images[row : row + 1], prompts[row : row + 1], **row_of)
                assert np.abs(tiny_flow.pixels(one)[0] - tiny_flow.pixels(edited)[row]).max() <= 1
            # The gate of the row with the learned word is that of its embedding.
            plain = model.generate(prompts, latents=latents, **{**settings, "tokens": None})
        assert np.abs(tiny_flow.pixels(plain)[1] - tiny_flow.pixels(drawn)[1]).max() > 0


def test_a_weight_scales_and_composed_ones_keep_their_own_gates(tiny_sd) -> None:
    first, second = gated(tiny_sd), gated(tiny_sd, ("a boat",), seed=1)
    both = compose([first, second], [1.0, 0.5])
    assert len(both.record["gates"]) == 2
    with first.attached(tiny_sd), second.attached(tiny_sd, weight=0.5):
        wanted = predicted(tiny_sd, "burning")
    torch.testing.assert_close(predicted(tiny_sd, "burning", both), wanted, atol=1e-5, rtol=1e-5)


def test_it_is_saved_and_read_and_neither_merged_nor_fitted_to_other_models(tiny_sd, tiny_sdxl, tmp_path: Path) -> None:
    delta = gated(tiny_sd)
    delta.save(tmp_path / "delta.safetensors")
    again = Delta.load(tmp_path / "delta.safetensors")
    assert torch.equal(predicted(tiny_sd, "burning", again), predicted(tiny_sd, "burning", delta))
    with pytest.raises(UserError, match="spm acts by how near a prompt is to the concept, so it cannot be merged"):
        delta.merge(tiny_sd)
    with pytest.raises(UserError, match="does not fit model 'tiny-sdxl'"), delta.attached(tiny_sdxl):
        pass


def test_a_denoiser_that_is_called_apart_from_its_family_is_refused(tiny_sd) -> None:
    text = tiny_sd.text(["a boat"])
    with gated(tiny_sd).attached(tiny_sd), pytest.raises(RuntimeError, match="apart from its family"):
        tiny_sd.denoiser(torch.zeros(1, 4, 16, 16), torch.tensor([5]), encoder_hidden_states=text.embeds)
