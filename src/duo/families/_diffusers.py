"""What every family is: a pipeline of diffusers with frozen weights, told what only it knows of its model."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.families._fitting import Fitting
from duo.families._loading import freeze, load_pipeline, save_pipeline
from duo.families._sampling import (
    as_rgb,
    check_latents,
    check_masks,
    check_rows,
    check_side,
    check_steps,
    decode_image,
    encode_images,
    layers_in,
    make_pipeline,
    new_scheduler,
    pasted,
    sample,
    size_within,
)
from duo.families._text import PromptCache, span
from duo.plugins import Family, Sampling, Span

BY_ROW = ("image", "mask_image", "latents")  # what pipelines are given a row of for each image


class DiffusersFamily(Family):
    """A diffusers pipeline with frozen weights, as `duo.plugins.Family`.

    A family adds its `process`, `_encode`, `predict`, `token_embeddings`, `encode_ids`, `word_parts` and `kohya`.
    Images come from diffusers' own pipelines, given encoded prompts.
    """

    _drawing: ClassVar[Any]  # diffusers' pipeline that makes images of prompts
    _editing: ClassVar[Any]  # the one that starts from an image
    _inpainting: ClassVar[Any]  # and the one that draws a part of it anew
    _inpainted: ClassVar[int | None] = None  # the latent channels that the last one insists on
    _scopes: ClassVar[Mapping[str, re.Pattern[str]]]  # what the names of a scope's layers match
    _optional: ClassVar[tuple[str, ...]] = ()  # components that a model may lack
    _dropped: ClassVar[tuple[str, ...]] = ()  # and those that are never loaded
    _settings: ClassVar[Mapping[str, Any]] = {}  # what these pipelines' constructors are told

    def __init__(self, pipeline: Any, *, name: str) -> None:
        self.name = name
        self.device = torch.device(pipeline.device)
        denoiser: Any = getattr(pipeline, self.component)
        self.denoiser: nn.Module = denoiser
        self._dtype: torch.dtype = denoiser.dtype
        self._scheduler: Any = pipeline.scheduler
        self._parts: dict[str, Any] = {  # what else its pipelines are made of
            part: None if part in self._dropped else module
            for part, module in pipeline.components.items()
            if part not in (self.component, "scheduler")
        }
        self._vae: Any = pipeline.vae
        self._images: Any = pipeline.image_processor
        self._fitting = Fitting()
        self._plain = PromptCache(lambda prompt: self._encode([prompt], {}))
        freeze((self.denoiser, *self.encoders()))

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
    ) -> Self:
        """Read a diffusers folder, hub model or single checkpoint (with `config`'s settings), safetensors only."""
        pipeline = load_pipeline(
            cls._drawing,
            path_or_id,
            name=name,
            dtype=dtype,
            config=config,
            optional=cls._optional,
            dropped=cls._dropped,
            **cls._settings,
        )
        return cls(pipeline.to(device), name=name)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) at the model's own image size."""
        config: Any = self.denoiser.config
        return config.in_channels, config.sample_size, config.sample_size

    def check(self, sampling: Sampling, *, size: tuple[int, int] | None = None) -> None:
        """Raise `UserError` where the scheduler or the steps do not go with the model, or images of `size` do not."""
        check_steps(new_scheduler(self._scheduler, sampling.scheduler, model=self.name), sampling)
        if size is not None:
            self._check_size(*size)

    def sampler(self, sampling: Sampling) -> str:
        """The class of the scheduler that images are sampled with: the model's own unless another is named."""
        return type(new_scheduler(self._scheduler, sampling.scheduler, model=self.name)).__name__

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts: `embeds` (n, length, width) and, where the family has it, `pooled` (n, pooled width).

        Differentiable in `tokens`: a placeholder stands for its k vectors wherever it occurs as a whole word. A prompt
        too long loses its end.
        """
        return self._encode(prompts, tokens) if tokens else self._plain(prompts)

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt: the empty prompt."""
        return self.text([""])

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), shifted and scaled as the VAE's config says.

        Sides are rounded down to what the denoiser can take: whole latents, or whole patches of them.
        """
        return encode_images(self._vae, self._images, images, generator=generator, device=self.device)

    def images(self, latents: Tensor) -> list[Image]:
        """VAE-decode what `latents` encodes, (n, channels, height, width), one by one."""
        return [decode_image(self._vae, self._images, row.to(self.device)) for row in latents.split(1)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        latents: Tensor | None = None,
    ) -> list[Image]:
        """Sample with diffusers' pipeline at the model's own size, all prompts in one batch where memory has room.

        `latents` (n, *latent_shape) are unit normal noise to start from; a sampler that adds noise still draws that
        from the seeds.
        """
        check_rows(prompts, seeds, negative_prompts)
        pipeline = self._pipeline(self._drawing, sampling.scheduler)
        given: dict[str, Any] = {**self._size(None)}
        if latents is not None:
            check_latents(latents, prompts, self.latent_shape)
            given["latents"] = latents.to(self.device, self._dtype)  # the pipelines scale it as their scheduler wants
        return self._drawn(pipeline, prompts, negative_prompts, seeds=seeds, sampling=sampling, tokens=tokens, **given)

    @torch.no_grad()
    def edit(
        self,
        images: Sequence[Image],
        prompts: Sequence[str],
        *,
        strength: float,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
        masks: Sequence[Image] | None = None,
    ) -> list[Image]:
        """SDEdit with diffusers' image-to-image pipeline at the images' size, in one batch where memory has room.

        With `masks` by its inpainting pipeline, with this same denoiser: at each step what is black is put back, as
        noised as the step is. White is drawn anew, from the image noised to `strength`, and at 1 from noise alone.
        """
        check_rows(prompts, seeds, negative_prompts, images=images)
        images, size = as_rgb(images), self._size(images)
        if masks is not None:
            check_masks(masks, images)
            if self._inpainted not in (None, self.latent_shape[0]):
                raise UserError(
                    f"model {self.name!r}: {self._inpainting.__name__} takes denoisers of {self._inpainted} latent "
                    f"channels, not of {self.latent_shape[0]}; leave out what inpaints"
                )
            # A U-Net's pipeline is told the size only here, and in multiples of 8.
            size = size or size_within(images, math.lcm(8, self._images.config.vae_scale_factor))
        pipeline = self._pipeline(self._editing if masks is None else self._inpainting, sampling.scheduler)
        given: dict[str, Any] = {"image": images, "strength": strength, **size}
        if masks is not None:
            given["mask_image"] = list(masks)
        drawn = self._drawn(pipeline, prompts, negative_prompts, seeds=seeds, sampling=sampling, tokens=tokens, **given)
        return drawn if masks is None else pasted(drawn, images, masks)

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """The denoiser's Linear and Conv2d modules of a scope, by name; the scopes are its kind's (`SCOPES`)."""
        return layers_in(self.denoiser, scope, self._scopes)

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [module for module in self._parts.values() if isinstance(module, nn.Module)]

    def spans(self, prompt: str) -> list[Span]:
        """One, where all text encoders stand side by side."""
        return [span(self.tokenizer(), prompt)]

    def tokenizer(self) -> Any:
        """The (first) `CLIPTokenizer`."""
        return self._parts["tokenizer"]

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        save_pipeline(self._pipeline(self._drawing, None), folder)

    @abstractmethod
    def _encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Conditioning:
        """Encode prompts with learned words, of which there may be none."""

    def _check_size(self, width: int, height: int) -> None:
        """Raise `UserError` where an image of that size leaves no whole latent, or no patch of them."""
        check_side((width, height), self._images.config.vae_scale_factor)

    def _size(self, images: Sequence[Image] | None) -> Mapping[str, int]:
        """What the pipelines are told of the size of images to be edited (None: of new ones), where they must be."""
        return {}

    def _drawn(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        **given: Any,
    ) -> list[Image]:
        """`_draw` of as many rows at once as fit the device."""
        by_row = {name: given.pop(name) for name in BY_ROW if name in given}

        def draw(rows: slice) -> list[Image]:
            negatives = None if negative_prompts is None else negative_prompts[rows]
            own = {name: values[rows] for name, values in by_row.items()}
            return self._draw(pipeline, prompts[rows], negatives, seeds=seeds[rows], **given, **own)

        size = by_row["image"][0].size if by_row.get("image") else None
        return self._fitting.drawn(draw, len(prompts), kind=(type(pipeline), size))

    def _draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        tokens: Mapping[str, Tensor] | None = None,
        **given: Any,
    ) -> list[Image]:
        """One batch of `pipeline`, which is also `given` other arguments of its own."""
        text = self.text(prompts, tokens=tokens)
        if negative_prompts is None:
            negative = self.unconditional().expand(len(prompts))
        else:
            negative = self.text(negative_prompts)
        given |= {"prompt_embeds": text.embeds, "negative_prompt_embeds": negative.embeds}
        if text.pooled is not None:
            given |= {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": negative.pooled}
        return sample(pipeline, seeds=seeds, sampling=sampling, **given)

    def _pipeline(self, kind: Any, scheduler: str | None) -> Any:
        """A pipeline of diffusers' class `kind` around the model, with the scheduler class named (its own: None)."""
        own = new_scheduler(self._scheduler, scheduler, model=self.name)
        parts = {self.component: self.denoiser, "scheduler": own, **self._parts}
        return make_pipeline(kind, **parts, **self._settings)
