"""Starting noise, learned words and masks against diffusers' own pipelines, for every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny_flow
import tiny_unet
from duo.errors import UserError
from duo.families.flux import Flux
from duo.families.sd import Sd
from duo.families.sd3 import Sd3
from duo.families.sdxl import Sdxl
from duo.plugins import Sampling
from tiny_flow import generators, picture, pixels

PROMPTS, NEGATIVE = ["a red house on fire", "a blue boat"], ["the beach", "a car"]
SHORT = Sampling(num_inference_steps=3, guidance_scale=3.0)
TOLD: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


@dataclass(frozen=True, kw_only=True)
class Kind:
    family: Any
    make: Callable[[Path], Any]
    inpainting: str
    side: int
    settings: Any = ()
    negative: bool = True  # whether a negative prompt is diffusers' ordinary guidance


KINDS = {
    "sd2": Kind(
        family=Sd,
        make=tiny_unet.sd2_v_pipeline,
        inpainting="StableDiffusionInpaintPipeline",
        side=64,
        settings=(("requires_safety_checker", False),),
    ),
    "sdxl": Kind(
        family=Sdxl,
        make=tiny_unet.sdxl_pipeline,
        inpainting="StableDiffusionXLInpaintPipeline",
        side=64,
        settings=(("add_watermarker", False),),
    ),
    "sd3": Kind(
        family=Sd3,
        make=lambda vocabulary: tiny_flow.sd3_pipeline(vocabulary, channels=16),
        inpainting="StableDiffusion3InpaintPipeline",
        side=32,
    ),
    "flux": Kind(family=Flux, make=tiny_flow.flux_pipeline, inpainting="FluxInpaintPipeline", side=32, negative=False),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def model(kind: Kind, vocabulary: Path) -> Any:
    return kind.family(kind.make(vocabulary), name="tiny")


def drawn_by(seeds: list[int], model: Any) -> torch.Tensor:
    """The noise that these seeds draw first, unit normal."""
    return torch.cat([torch.randn(1, *model.latent_shape, generator=one) for one in generators(*seeds)])


def box(size: tuple[int, int], where: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, where)
    return mask


def scene(kind: Kind) -> tuple[list[Image.Image], list[Image.Image]]:
    side = kind.side
    images = [picture(row, width=side, height=side) for row in range(2)]
    return images, [box((side, side), (0, 0, side // 2, side)), box((side, side), (8, 8, side - 8, side))]


def apart(ours: Any, theirs: Any) -> int:
    return int(np.abs(pixels(ours) - pixels(theirs)).max())


def test_the_latents_that_a_seed_draws_give_the_image_of_the_seed(model: Any, kind: Kind) -> None:
    wanted = model.generate(PROMPTS, seeds=[3, 4], sampling=SHORT)
    ours = model.generate(PROMPTS, seeds=[8, 9], sampling=SHORT, latents=drawn_by([3, 4], model))
    assert apart(ours, wanted) == 0
    assert apart(ours, model.generate(PROMPTS, seeds=[8, 9], sampling=SHORT)) > 1
    alone = model.generate(PROMPTS[1:], seeds=[8], sampling=SHORT, latents=drawn_by([4], model))
    assert apart(ours[1:], alone) <= 1


def test_latents_are_what_diffusers_takes_as_latents(model: Any, kind: Kind, vocabulary: Path) -> None:
    latents = 0.7 * drawn_by([5, 6], model)
    pipeline, size = kind.make(vocabulary), {"height": kind.side, "width": kind.side}
    given = latents
    if kind.family is Flux:
        given = pipeline._pack_latents(latents, 2, *model.latent_shape)
    theirs = pipeline(PROMPTS, latents=given, generator=generators(1, 2), **TOLD, **size).images
    assert apart(model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT, latents=latents), theirs) <= 1


def test_latents_of_rows_with_and_without_a_negative_prompt_stay_theirs(model: Any) -> None:
    latents = drawn_by([3, 4, 5], model)
    prompts, negatives = [*PROMPTS, "a car"], ["", "the beach", ""]
    given: dict[str, Any] = {"seeds": [0, 1, 2], "sampling": SHORT, "negative_prompts": negatives}
    ours = model.generate(prompts, latents=latents, **given)
    for row in range(3):
        own = {"seeds": [row], "sampling": SHORT, "negative_prompts": [negatives[row]]}
        alone = model.generate([prompts[row]], latents=latents[row : row + 1], **own)
        assert apart(ours[row : row + 1], alone) <= 1


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_latents_have_unit_variance_whatever_the_scheduler_scales_by(tiny_sd: Any, name: str) -> None:
    sampling = Sampling(num_inference_steps=3, guidance_scale=3.0, scheduler=name)
    wanted = tiny_sd.generate(PROMPTS, seeds=[3, 4], sampling=sampling)
    ours = tiny_sd.generate(PROMPTS, seeds=[8, 9], sampling=sampling, latents=drawn_by([3, 4], tiny_sd))
    assert apart(ours, wanted) == 0


def test_latents_of_another_shape_are_refused(model: Any) -> None:
    for latents in (drawn_by([3], model), drawn_by([3, 4], model)[..., :4]):
        with pytest.raises(ValueError, match=r"latents of shape .*, expected \(2, "):
            model.generate(PROMPTS, seeds=[1, 2], sampling=SHORT, latents=latents)


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_equals_diffusers_but_for_the_pixels_that_stay(
    model: Any, kind: Kind, vocabulary: Path, strength: float
) -> None:
    images, masks = scene(kind)
    negative = NEGATIVE if kind.negative else None
    ours = model.edit(
        images, PROMPTS, strength=strength, seeds=[3, 4], sampling=SHORT, negative_prompts=negative, masks=masks
    )
    components = dict(kind.make(vocabulary).components)
    pipeline = getattr(diffusers, kind.inpainting)(**components, **dict(kind.settings))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        image=images,
        mask_image=masks,
        strength=strength,
        height=kind.side,
        width=kind.side,
        generator=generators(3, 4),
        **TOLD,
        **({"negative_prompt": negative} if negative else {}),
    ).images
    for one, image, mask, wanted in zip(ours, images, masks, theirs, strict=True):
        white = np.asarray(mask) > 0
        assert np.array_equal(np.asarray(one)[~white], np.asarray(image)[~white])
        assert np.abs(pixels([one])[0][white] - pixels([wanted])[0][white]).max() <= 1
        assert np.abs(pixels([one])[0][white] - pixels([image])[0][white]).max() > 1


def test_a_black_mask_changes_nothing_and_a_row_is_its_own(model: Any, kind: Kind) -> None:
    images, masks = scene(kind)
    masks = [Image.new("L", images[0].size), masks[1]]
    settings: dict[str, Any] = {"strength": 0.7, "sampling": SHORT}
    ours = model.edit(images, PROMPTS, seeds=[3, 4], masks=masks, **settings)
    assert apart(ours[:1], images[:1]) == 0
    alone = model.edit(images[1:], PROMPTS[1:], seeds=[4], masks=masks[1:], **settings)
    assert apart(ours[1:], alone) <= 1
    assert apart(ours[1:], model.edit(images[1:], PROMPTS[1:], seeds=[5], masks=masks[1:], **settings)) > 1


def test_what_is_masked_out_at_strength_1_leaves_no_trace(model: Any, kind: Kind) -> None:
    """White is drawn from noise alone, so what an image has there does not matter."""
    images, masks = scene(kind)
    other = images[0].copy()
    other.paste((255, 0, 0), masks[0].getbbox())
    settings: dict[str, Any] = {"seeds": [3], "sampling": SHORT, "masks": masks[:1]}
    whole = Image.new("L", images[0].size, 255)
    ours, theirs = (
        model.edit([one], PROMPTS[:1], strength=1.0, **{**settings, "masks": [whole]}) for one in (images[0], other)
    )
    assert apart(ours, theirs) == 0
    ours, theirs = (model.edit([one], PROMPTS[:1], strength=0.5, **settings) for one in (images[0], other))
    assert apart(ours, theirs) > 1


def test_an_image_of_an_odd_size_keeps_it_and_its_black_pixels(model: Any) -> None:
    image = picture(0, width=45, height=42)
    mask = box(image.size, (0, 0, 20, 42))
    (ours,) = model.edit([image], ["a"], strength=0.7, seeds=[0], sampling=SHORT, masks=[mask])
    assert ours.size == image.size
    black = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(ours)[black], np.asarray(image)[black])
    assert np.abs(pixels([ours])[0] - pixels([image])[0]).max() > 1


def test_grey_is_black_below_one_half(tiny_sd: Any) -> None:
    image, mask = picture(0, width=64, height=64), Image.new("L", (64, 64), 127)
    settings: dict[str, Any] = {"strength": 0.7, "seeds": [0], "sampling": SHORT}
    assert apart(tiny_sd.edit([image], ["a"], masks=[mask], **settings), [image]) == 0
    mask = Image.new("L", (64, 64), 128)
    white = Image.new("L", (64, 64), 255)
    ours, wanted = (tiny_sd.edit([image], ["a"], masks=[one], **settings) for one in (mask, white))
    assert apart(ours, wanted) == 0 < apart(ours, [image])


def test_learned_words_reach_edited_images(model: Any, kind: Kind) -> None:
    images, masks = scene(kind)
    (row,) = model.tokenizer()("red", add_special_tokens=False).input_ids
    tokens = {"<x>": model.token_embeddings()[row : row + 1]}
    settings: dict[str, Any] = {"strength": 0.7, "seeds": [3], "sampling": SHORT}
    for more in ({}, {"masks": masks[:1]}):
        ours = model.edit(images[:1], ["a <x> house"], tokens=tokens, **settings, **more)
        assert apart(ours, model.edit(images[:1], ["a red house"], **settings, **more)) <= 1
        assert apart(ours, model.edit(images[:1], ["a <x> house"], **settings, **more)) > 0


def test_masks_that_do_not_fit_are_refused(model: Any, kind: Kind) -> None:
    images, masks = scene(kind)
    settings: dict[str, Any] = {"strength": 0.7, "seeds": [3, 4], "sampling": SHORT}
    for wrong in (masks[:1], [masks[0], Image.new("L", (8, 8))]):
        with pytest.raises(ValueError, match="masks do not match 2 images"):
            model.edit(images, PROMPTS, masks=wrong, **settings)


def test_a_denoiser_that_diffusers_cannot_inpaint_with_is_one_line(vocabulary: Path) -> None:
    model = Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")
    image, mask = picture(0), Image.new("L", (32, 32), 255)
    with pytest.raises(UserError, match=r"StableDiffusion3InpaintPipeline takes denoisers of 16 .*, not of 8"):
        model.edit([image], ["a"], strength=0.7, seeds=[0], sampling=SHORT, masks=[mask])


def test_decoded_latents_are_the_images_of_diffusers(model: Any, kind: Kind, vocabulary: Path) -> None:
    pipeline, given = kind.make(vocabulary), {**TOLD, "height": kind.side, "width": kind.side}
    latents = pipeline(PROMPTS, generator=generators(3, 4), output_type="latent", **given).images
    wanted = pipeline(PROMPTS, generator=generators(3, 4), **given).images
    if kind.family is Flux:
        latents = pipeline._unpack_latents(latents, kind.side, kind.side, pipeline.vae_scale_factor)
    ours = model.images(latents)
    assert apart(ours, wanted) <= 1
    assert apart(model.images(1.5 * latents), wanted) > 1


def test_a_float16_vae_is_upcast_to_decode_where_it_asks_for_it(vocabulary: Path) -> None:
    model = Sdxl(tiny_unet.sdxl_pipeline(vocabulary).to(torch.float16), name="tiny")
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    model._vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    model.images(latents)
    assert seen == [torch.float32] and model._vae.dtype == torch.float16
