"""SD 2.x, which predicts v, against diffusers' own schedulers and pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from duo.errors import UserError
from duo.families.sd import Sd
from duo.models import load_family
from duo.plugins import Sampling
from tiny_unet import sd2_v_pipeline

PROMPTS = ["a red house on fire", "a blue boat"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
SAME = {"num_inference_steps": 3, "guidance_scale": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def pipeline_with(vocabulary: Path, **settings: Any) -> Any:
    """The tiny SD 2 with other scheduler settings."""
    pipeline = sd2_v_pipeline(vocabulary)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


@pytest.mark.parametrize("settings", [{}, {"prediction_type": "epsilon"}, ZERO_SNR], ids=["v", "epsilon", "zero SNR"])
def test_generate_and_edit_equal_diffusers(vocabulary: Path, settings: dict[str, Any]) -> None:
    model = Sd(pipeline_with(vocabulary, **settings), name="tiny")
    ours = model.generate(PROMPTS, seeds=[3, 4], sampling=SHORT, negative_prompts=["the beach", ""])
    theirs = pipeline_with(vocabulary, **settings)
    wanted = theirs(PROMPTS, negative_prompt=["the beach", ""], generator=generators(3, 4), **SAME).images
    assert np.abs(pixels(ours) - pixels(wanted)).max() <= 1
    images = [picture(0), picture(1)]
    edited = model.edit(images, PROMPTS, strength=0.7, seeds=[3, 4], sampling=SHORT)
    img2img = StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    wanted = img2img(PROMPTS, image=images, strength=0.7, generator=generators(3, 4), **SAME).images
    assert np.abs(pixels(edited) - pixels(wanted)).max() <= 1


def test_the_prediction_type_matters(vocabulary: Path) -> None:
    v, epsilon = (
        Sd(pipeline_with(vocabulary, prediction_type=kind), name="tiny").generate(PROMPTS, seeds=[3, 4], sampling=SHORT)
        for kind in ("v_prediction", "epsilon")
    )
    assert np.abs(pixels(v) - pixels(epsilon)).max() > 1


@pytest.mark.parametrize("settings", [{}, ZERO_SNR], ids=["v", "zero SNR"])
def test_the_process_is_the_schedulers(vocabulary: Path, settings: dict[str, Any]) -> None:
    pipeline = pipeline_with(vocabulary, **settings)
    process = Sd(pipeline, name="tiny").process
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 1, 500, 998, 999])
    torch.testing.assert_close(process.noised(x0, eps, t), pipeline.scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(process.target(x0, eps, t), pipeline.scheduler.get_velocity(x0, eps, t))
    if settings:  # the last step holds no signal: v is −x0
        torch.testing.assert_close(process.noised(x0, eps, t)[4], eps[4])
        torch.testing.assert_close(process.target(x0, eps, t)[4], -x0[4])


def test_the_terminal_point_is_what_the_sampler_hands_over_first(vocabulary: Path) -> None:
    model = Sd(pipeline_with(vocabulary, **ZERO_SNR), name="tiny")
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.denoiser.register_forward_pre_hook(lambda _module, arguments: calls.append((arguments[0], arguments[1])))
    model.generate(["a car"], seeds=[7], sampling=Sampling(num_inference_steps=2, guidance_scale=1.0))
    x_t, t = model.process.terminal(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)))
    torch.testing.assert_close(calls[0][0], x_t)
    assert calls[0][1].item() == t.item() == 999


def test_a_sampler_that_would_forget_the_zero_snr_is_refused(vocabulary: Path) -> None:
    model = Sd(pipeline_with(vocabulary, **ZERO_SNR), name="tiny")
    with pytest.raises(UserError, match="'PNDMScheduler' cannot keep the noise schedule"):
        model.generate(["a car"], seeds=[0], sampling=Sampling(num_inference_steps=2, scheduler="PNDMScheduler"))
    euler = Sampling(num_inference_steps=2, scheduler="EulerDiscreteScheduler")
    assert len(model.generate(["a car"], seeds=[0], sampling=euler)) == 1


def test_what_is_predicted_must_be_known(vocabulary: Path) -> None:
    with pytest.raises(UserError, match="prediction_type 'sample' is not supported"):
        Sd(pipeline_with(vocabulary, prediction_type="sample"), name="tiny")


def test_prompts_are_padded_as_the_tokenizer_says(tiny_sd2_v: Any, vocabulary: Path) -> None:
    theirs, _ = sd2_v_pipeline(vocabulary).encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(tiny_sd2_v.text(PROMPTS).embeds, theirs)
    learned = {"<x>": torch.ones(2, 32)}
    pipeline = sd2_v_pipeline(vocabulary)
    pipeline.load_textual_inversion(learned, token="<x>")
    theirs, _ = pipeline.encode_prompt(["a <x> house"], "cpu", 1, False)
    torch.testing.assert_close(tiny_sd2_v.text(["a <x> house"], tokens=learned).embeds, theirs)


def test_the_folder_is_loaded_with_its_prediction_type(tiny_sd2_v: Any, tiny_sd2_v_folder: Path) -> None:
    loaded = load_family(str(tiny_sd2_v_folder))
    assert isinstance(loaded, Sd)
    assert loaded.process.prediction_type == "v_prediction"  # type: ignore[attr-defined]
    ours, read = (model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT) for model in (tiny_sd2_v, loaded))
    assert np.abs(pixels(ours) - pixels(read)).max() <= 1


@pytest.mark.parametrize(("spacing", "first"), [("leading", 981), ("linspace", 999), ("trailing", 999)])
def test_a_sampler_with_leading_spacing_starts_below_the_terminal_step(
    vocabulary: Path, spacing: str, first: int
) -> None:
    model = Sd(pipeline_with(vocabulary, timestep_spacing=spacing), name="tiny")
    calls: list[int] = []

    def stop(_: object, arguments: tuple[Any, ...]) -> None:
        calls.append(int(arguments[1]))
        raise KeyboardInterrupt

    model.denoiser.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model.generate(["a car"], seeds=[7], sampling=Sampling(num_inference_steps=50, guidance_scale=1.0))
    assert calls == [first]
    assert model.process.terminal(torch.zeros(1))[1].item() == 999
