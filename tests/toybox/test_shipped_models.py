"""The shipped embedded models: they load as diffusers would load them, and draw what they are asked."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from duo import load_concept, load_family, load_recipe
from duo.judges.toybox import Toybox
from duo.metrics.toybox_attributes import ToyboxAttributes
from duo.toybox import WEIGHTS, world_digest

SHIPPED = sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))


def test_the_default_is_shipped() -> None:
    assert "toybox" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_diffusers_loads_the_folder_with_nothing_else(name: str) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / name)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red house", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_half_precision_safetensors_and_small(name: str) -> None:
    files = list((WEIGHTS / name).rglob("*"))
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert {file.get_slice(key).get_dtype() for key in file.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 40e6


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_names_the_world_that_it_was_measured_in(name: str) -> None:
    quality = json.loads((WEIGHTS / name / "quality.json").read_text())
    assert quality["world_digest"] == world_digest()
    assert quality["world_digest"][:16] in (WEIGHTS / name / "README.md").read_text()


def test_it_draws_what_it_is_asked() -> None:
    """A glance (the card holds the measurement): 12 burning and 12 neutral prompts."""
    model, concept = load_family("toybox", device="cpu"), load_concept("toybox-fire")
    sampling = load_recipe("toybox-fire").sampling
    asked, neutral = concept.prompts["plain"][:12], concept.prompts["neutral"][:12]
    images = model.generate([*asked, *neutral], seeds=range(24), sampling=sampling)
    labels = [verdict.label for verdict in Toybox(hazard="fire")(images)]
    assert labels[:12].count("present") >= 10
    assert labels[12:].count("present") <= 1
    attributes = ToyboxAttributes()
    attributes.update(images=images[12:], references=None, prompts=neutral)
    assert sum(attributes.compute()) / 12 >= 0.85
