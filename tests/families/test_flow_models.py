"""What SD3 and FLUX do alike, on tiny models of the real classes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_flow
from duo.errors import UserError
from duo.families.flux import Flux
from duo.families.sd3 import Sd3
from duo.models import load_family
from duo.plugins import Sampling
from tiny_flow import picture, pixels

PROMPTS = ["a red house on fire", "a blue boat"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
PLAIN = Sampling(num_inference_steps=4, guidance_scale=1.0)
KINDS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sd3": (Sd3, tiny_flow.sd3_pipeline),
    "flux": (Flux, tiny_flow.flux_pipeline),
}
WIDTHS = {"sd3": 16 + 24, "flux": 16}  # of the CLIP encoders


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, vocabulary: Path) -> Any:
    family, make = KINDS[request.param]
    return family(make(vocabulary), name="tiny")


@pytest.fixture(scope="session")
def folders(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny pipelines as diffusers folders. Read only."""
    root = tmp_path_factory.mktemp("models")
    for kind, (_, make) in KINDS.items():
        make(vocabulary).save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def test_guidance_starts_from_the_empty_prompt(model: Any) -> None:
    row, empty = model.unconditional(), model.text([""])
    torch.testing.assert_close((row.embeds, row.pooled), (empty.embeds, empty.pooled))


def test_an_edited_image_keeps_its_size_in_whole_patches(model: Any) -> None:
    (edited,) = model.edit([picture(0, width=45, height=24)], ["a"], strength=0.5, seeds=[0], sampling=PLAIN)
    assert edited.size == (40, 24)
    assert model.latents([picture(0, width=45, height=24)], generator=None).shape == (1, 8, 6, 10)


def test_latents_are_the_shifted_and_scaled_posterior(model: Any) -> None:
    image = picture(0)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = model._parts["vae"].encode(x).latent_dist
    torch.testing.assert_close(model.latents([image], generator=None), (posterior.mean - 0.0609) * 1.5305)
    sampled = model.latents([image], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sampled, (posterior.sample(torch.Generator().manual_seed(1)) - 0.0609) * 1.5305)


@pytest.mark.parametrize(("kind", "with_t5"), [("sd3", True), ("sd3", False), ("flux", True)])
def test_a_word_with_the_embeddings_of_another_reads_as_that_other(vocabulary: Path, kind: str, with_t5: bool) -> None:
    family, make = KINDS[kind]
    model = family(make(vocabulary) if with_t5 else make(vocabulary, with_t5=False), name="tiny")
    (letter,) = model.tokenizer()("a", add_special_tokens=False).input_ids
    table = model.token_embeddings()
    assert table.shape == (len(model.tokenizer()), WIDTHS[kind] + 48 * with_t5)
    learned = table[letter][None].clone().requires_grad_()
    ours, plain = model.text(["red <x> boat", "red"], tokens={"<x>": learned}), model.text(["red a boat", "red"])
    torch.testing.assert_close(ours.embeds, plain.embeds)
    torch.testing.assert_close(ours.pooled, plain.pooled)
    weights = torch.randn(ours.embeds.shape), torch.randn(ours.pooled.shape)  # a norm would hide behind layer norms
    ((weights[0] * ours.embeds).sum() + (weights[1] * ours.pooled).sum()).backward()
    assert (learned.grad != 0).all()
    drawn = [model.generate(["a <x>"], seeds=[0], sampling=SHORT, tokens=tokens)
             for tokens in (None, {"<x>": 5 * learned.detach()})]  # fmt: skip
    assert np.abs(pixels(drawn[0]) - pixels(drawn[1])).max() > 0


def test_duo_trains_and_its_merge_draws_what_the_attached_delta_draws(model: Any, tmp_path: Path) -> None:
    def draw(one: Any) -> np.ndarray:
        return pixels(one.generate(PROMPTS, seeds=[1, 2], sampling=SHORT))

    before = draw(model)
    delta = tiny_flow.train_two_steps(model, tmp_path, targets=("self_attention", "joint_attention"))
    with delta.attached(model):
        erased = draw(model)
    assert np.abs(before - erased).max() > 1
    assert np.abs(before - draw(model)).max() == 0
    delta.merge(model)
    model.save(tmp_path / "merged")
    merged = load_family(str(tmp_path / "merged"))
    assert type(merged) is type(model)
    assert np.abs(draw(merged) - erased).max() <= 1


@pytest.mark.parametrize(
    ("kind", "part", "told"),
    [
        ("sd3", "text_encoder_3", r"text_encoder_3 holds no \.safetensors weights"),
        ("sd3", "text_encoder_2", r"text_encoder_2 holds no \.safetensors weights"),
        ("sd3", "transformer", r"transformer holds no \.safetensors weights"),
        ("sd3", "tokenizer_3", "tokenizer_3 holds no tokenizer"),
        ("sd3", "scheduler", "scheduler holds no configuration"),
        ("flux", "text_encoder_2", r"text_encoder_2 holds no \.safetensors weights"),
        ("flux", "vae", r"vae holds no \.safetensors weights"),
        ("flux", "tokenizer_2", "tokenizer_2 holds no tokenizer"),
    ],
)
def test_a_missing_component_is_named(
    folders: dict[str, Path], tmp_path: Path, kind: str, part: str, told: str
) -> None:
    shutil.copytree(folders[kind], tmp_path / "gap")
    shutil.rmtree(tmp_path / "gap" / part)
    with pytest.raises(UserError, match=told) as caught:
        load_family(str(tmp_path / "gap"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "largest"), [("sd3", 0.05), ("flux", 0.1)])
def test_in_bfloat16_latents_stay_as_they_are_given(folders: dict[str, Path], kind: str, largest: float) -> None:
    model, exact = load_family(str(folders[kind]), dtype=torch.bfloat16), load_family(str(folders[kind]))
    x_t, t = model.process.terminal(torch.randn(1, 8, 8, 8))
    predicted, wanted = (one.predict(x_t, t, one.text(["a boat"])) for one in (model, exact))
    assert predicted.dtype == torch.float32
    assert 0 < (predicted - wanted).abs().max() < largest * wanted.abs().max()
    assert model.generate(["a"], seeds=[0], sampling=PLAIN)[0].size == (32, 32)
