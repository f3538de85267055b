"""What every family does to draw: diffusers' own pipelines, one generator an image, the VAE, schedulers, scopes."""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL.Image import Image, Resampling, composite
from torch import Tensor, nn

from duo.errors import UserError, did_you_mean, first_line
from duo.plugins import Sampling


def make_pipeline(kind: Any, **components: Any) -> Any:
    """A pipeline of diffusers' class `kind` around networks that are shared, without a progress bar."""
    pipeline = kind(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, *, seeds: Sequence[int], sampling: Sampling, **arguments: Any) -> list[Image]:
    """Images of one batch; image i depends on seeds[i] alone. `arguments` are the pipeline's own.

    Raises `UserError` where an image is not finite, which diffusers would hand over as a black one.
    """
    check_steps(pipeline.scheduler, sampling)
    with warnings.catch_warnings():
        # SDXL's pipelines upcast a float16 VAE by a method that diffusers itself has deprecated.
        warnings.filterwarnings("ignore", "`upcast_vae` is deprecated", FutureWarning)
        pixels = pipeline(
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            output_type="np",
            **arguments,
        ).images
    for seed, image in zip(seeds, pixels, strict=True):
        if not np.isfinite(image).all():
            raise UserError(
                f"the image of seed {seed} came out as NaN: float16 overflowed, where bfloat16 or float32 would not, "
                "or the model's weights are damaged"
            )
    images: list[Image] = pipeline.image_processor.numpy_to_pil(pixels)  # what the pipeline itself does next
    return images


def check_steps(scheduler: Any, sampling: Sampling) -> None:
    """Raise `UserError` where images would be sampled in more steps than the model was trained on."""
    trained = scheduler.config.num_train_timesteps
    if sampling.num_inference_steps > trained:
        raise UserError(f"sampling.num_inference_steps is {sampling.num_inference_steps}, expected at most {trained}")


def check_side(size: tuple[int, int], least: int) -> None:
    """Raise `UserError` where a side of an image (width, height) has fewer pixels than `least`."""
    if min(size) < least:
        width, height = size
        raise UserError(f"an image of {width}×{height} is too small for this model; it needs at least {least} a side")


def check_rows(
    prompts: Sequence[str],
    seeds: Sequence[int],
    negative_prompts: Sequence[str] | None,
    *,
    images: Sequence[Image] | None = None,
) -> None:
    """Raise ValueError where the rows of a batch do not match one to one."""
    if images is not None and len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    negatives = len(prompts) if negative_prompts is None else len(negative_prompts)
    if not len(prompts) == len(seeds) == negatives:
        counts = f"{len(prompts)} prompts, {len(seeds)} seeds and {negatives} negative prompts"
        raise ValueError(f"{counts} do not match")


def check_latents(latents: Tensor, prompts: Sequence[str], shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless there is starting noise of `shape` for each prompt."""
    if latents.shape != (len(prompts), *shape):
        raise ValueError(f"latents of shape {tuple(latents.shape)}, expected {(len(prompts), *shape)}")


def check_masks(masks: Sequence[Image], images: Sequence[Image]) -> None:
    """Raise ValueError unless there is a mask of its size for each image."""
    if [mask.size for mask in masks] != [image.size for image in images]:
        raise ValueError(f"{len(masks)} masks do not match {len(images)} images one to one, in number or in size")


def as_rgb(images: Sequence[Image]) -> list[Image]:
    """The images in RGB, which must be of one size to make a batch."""
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        shown = " and ".join(f"{width}×{height}" for width, height in sizes[:2])
        raise UserError(f"the images of one batch have different sizes, {shown}; bring them to one size")
    return [image.convert("RGB") for image in images]


def size_within(images: Sequence[Image], multiple: int) -> dict[str, int]:
    """Height and width of the images of a batch, rounded down to multiples: of a transformer's patch, say."""
    width, height = images[0].size
    check_side((width, height), multiple)
    return {"height": height - height % multiple, "width": width - width % multiple}


def pasted(drawn: Sequence[Image], images: Sequence[Image], masks: Sequence[Image]) -> list[Image]:
    """What was drawn where a mask is white (128 and more, as for diffusers), and elsewhere the image's very pixels.

    The pipelines alone send all of an image through the VAE, and draw images of odd sizes a little smaller.
    """
    fitting = [new.resize(image.size, Resampling.LANCZOS) for new, image in zip(drawn, images, strict=True)]
    white = [mask.convert("L").point([255 * (level >= 128) for level in range(256)]) for mask in masks]
    return [composite(new, image, mask) for new, image, mask in zip(fitting, images, white, strict=True)]


@torch.no_grad()
def encode_images(
    vae: Any, processor: Any, images: Sequence[Image], *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """VAE latents (n, channels, height, width), shifted and scaled as the VAE's config says.

    The posterior's mean where `generator` is None. `processor` is the pipeline's image processor. A float16 VAE that
    asks for it (`force_upcast`) works in float32, as in diffusers' pipelines.
    """
    with _upcast(vae):
        pixels = processor.preprocess(as_rgb(images)).to(device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
    x0: Tensor = posterior.mode() if generator is None else posterior.sample(generator)
    shift, scale = _normalisation(vae, x0)
    return (x0 - shift) * scale


@torch.no_grad()
def decode_image(vae: Any, processor: Any, latents: Tensor) -> Image:
    """The image of VAE latents (1, channels, height, width) that are shifted and scaled as `encode_images` does it."""
    shift, scale = _normalisation(vae, latents)
    with _upcast(vae):
        pixels = vae.decode((latents / scale + shift).to(vae.dtype)).sample
    (image,) = processor.postprocess(pixels, output_type="pil")
    return image


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """Within the context a float16 VAE that asks for it (`force_upcast`) is in float32."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    try:
        if upcast:
            vae.to(torch.float32)
        yield
    finally:
        if upcast:
            vae.to(dtype)


def _normalisation(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """What is subtracted from a VAE's latents, and what they are multiplied by then."""
    config = vae.config
    mean, std = (config.get(f"latents_{part}") for part in ("mean", "std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, std))
        return mean, config.scaling_factor / std
    return config.get("shift_factor") or 0, config.scaling_factor


def new_scheduler(own: Any, name: str | None, *, model: str) -> Any:
    """A fresh scheduler, for it keeps state while it samples: of diffusers' class `name`, or of `own`'s where None.

    It takes over the config of the model's `own`. `UserError` where the class does not fit, or would sample on another
    noise schedule than the model was trained on, as one that does not know `rescale_betas_zero_snr` would.
    """
    known = {
        cls.__name__: cls for cls in [*own.compatibles, type(own)] if missing_packages(cls) or _of_a_kind(cls, own)
    }
    chosen = known.get(name or type(own).__name__)
    if chosen is None:
        usable = [other for other, cls in known.items() if _usable(cls, own)]
        raise UserError(
            f"scheduler = {name!r} does not fit model {model!r}{did_you_mean(str(name), usable)}; leave it out for the "
            f"model's own {type(own).__name__}"
        )
    if lacking := missing_packages(chosen):
        raise UserError(f"scheduler = {name!r} needs {lacking}, which is not installed; install it, or name another")
    try:
        scheduler = _built(chosen, own)
    except (ImportError, TypeError, ValueError, NotImplementedError) as error:
        told = first_line(error)
        raise UserError(f"scheduler = {name!r} cannot take the settings of model {model!r}: {told}") from error
    if not _same_noise(own, scheduler):
        raise UserError(
            f"scheduler = {name!r} cannot keep the noise schedule of model {model!r}; leave it out, or name another"
        )
    return scheduler


def missing_packages(cls: Any) -> str:
    """What a class of diffusers or transformers needs and is not installed: they have stand-ins for such classes."""
    needed = getattr(cls, "_backends", ()) if "DummyObject" in (kind.__name__ for kind in type(cls).__mro__) else ()
    return " and ".join(name for name in needed if importlib.util.find_spec(name) is None)


def _of_a_kind(cls: Any, own: Any) -> bool:
    """Whether a class has a noise schedule from betas where `own` has: diffusers' compatibles have others too."""
    return "beta_start" not in own.config or "beta_start" in inspect.signature(cls).parameters


def _usable(cls: Any, own: Any) -> bool:
    """Whether `new_scheduler` would take the class."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it tells what each class leaves of the config
    try:
        with warnings.catch_warnings():  # of classes that nobody asked for
            warnings.simplefilter("ignore")
            return not missing_packages(cls) and _same_noise(own, _built(cls, own))
    except (ImportError, TypeError, ValueError, NotImplementedError):
        return False
    finally:
        diffusers_logging.set_verbosity(level)


def _built(cls: Any, own: Any) -> Any:
    config = dict(own.config)
    if "clip_sample" in inspect.signature(cls).parameters:
        config.setdefault("clip_sample", False)  # the class's default clips to [−1, 1], which is for pixels
    return cls.from_config(config)


def _same_noise(own: Any, scheduler: Any) -> bool:
    """Whether `scheduler` samples on the noise schedule of `own`; those of rectified flow have no ᾱ to compare."""
    trained, sampled = (getattr(one, "alphas_cumprod", None) for one in (own, scheduler))
    if trained is None or sampled is None:  # EDMEulerScheduler has a schedule of its own, whatever the config says
        return trained is sampled
    return torch.allclose(trained, sampled, rtol=1e-4, atol=1e-6)  # some put 2⁻²⁴ where others have ᾱ = 0


def layers_in(denoiser: nn.Module, scope: str, scopes: Mapping[str, re.Pattern[str]]) -> dict[str, nn.Module]:
    """The Linear and Conv2d modules whose name the scope's pattern finds, by name."""
    if scope not in scopes:
        raise UserError(f"no layer scope is called {scope!r}{did_you_mean(scope, scopes)}")
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and scopes[scope].search(name)
    }
