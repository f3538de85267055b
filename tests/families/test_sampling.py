"""What every family does to draw: the bytes of diffusers' own images, images that are no numbers, schedulers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_flow
import tiny_unet
from duo.errors import UserError
from duo.families._sampling import new_scheduler, sample
from duo.families.sdxl import Sdxl
from duo.plugins import Sampling

SHORT = Sampling(num_inference_steps=2, guidance_scale=3.0)
MAKE = {
    "sd2": tiny_unet.sd2_v_pipeline,
    "sdxl": tiny_unet.sdxl_pipeline,
    "sd3": tiny_flow.sd3_pipeline,
    "flux": tiny_flow.flux_pipeline,
}


@pytest.mark.parametrize("kind", MAKE)
def test_images_are_those_of_the_pipeline_byte_for_byte(kind: str, vocabulary: Path) -> None:
    size = {"height": 32, "width": 32} if kind in ("sd3", "flux") else {}
    ours, theirs = MAKE[kind](vocabulary), MAKE[kind](vocabulary)
    drawn = sample(ours, seeds=[1, 2], sampling=SHORT, prompt=["a house", "a boat"], **size)
    wanted = theirs(
        ["a house", "a boat"],
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pil",
        **size,
    ).images
    assert [(image.mode, image.size, image.tobytes()) for image in drawn] == [
        (image.mode, image.size, image.tobytes()) for image in wanted
    ]


def test_an_image_that_is_no_number_is_an_error_and_not_black(tiny_sd: Any) -> None:
    next(tiny_sd.denoiser.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match="the image of seed 7 came out as NaN: float16 overflowed"):
        tiny_sd.generate(["a house"], seeds=[7], sampling=SHORT)


def test_a_float16_vae_of_sdxl_is_upcast_without_a_word(vocabulary: Path) -> None:
    model = Sdxl(tiny_unet.sdxl_pipeline(vocabulary).to(torch.float16), name="tiny")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.generate(["a house"], seeds=[1], sampling=SHORT)
    assert not [one for one in told if "upcast_vae" in str(one.message)]


def test_only_schedulers_that_can_be_used_are_proposed(
    vocabulary: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers import KDPM2DiscreteScheduler

    def missing(*_: object, **__: object) -> None:
        raise ImportError("it needs another package")

    monkeypatch.setattr(KDPM2DiscreteScheduler, "from_config", missing)
    own = tiny_unet.sd2_v_pipeline(vocabulary).scheduler
    with pytest.raises(UserError, match="scheduler = 'xyz' does not fit model 'tiny'") as caught:
        new_scheduler(own, "xyz", model="tiny")
    named = str(caught.value)
    assert "DDIMScheduler" in named and "EulerDiscreteScheduler" in named
    assert "EDMEulerScheduler" not in named and "KDPM2DiscreteScheduler" not in named
    assert capfd.readouterr().err == ""


def test_a_scheduler_with_a_noise_schedule_of_its_own_is_refused(vocabulary: Path) -> None:
    own = tiny_unet.sd2_v_pipeline(vocabulary).scheduler
    with pytest.raises(UserError, match="'EDMEulerScheduler' does not fit model 'tiny'"):
        new_scheduler(own, "EDMEulerScheduler", model="tiny")
