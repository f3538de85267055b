"""Stable Diffusion 1.x and 2.x, and any other model of diffusers' `StableDiffusionPipeline` (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL.Image import Image
from torch import Tensor, nn

from duo.conditioning import Conditioning
from duo.families._kohya import unet_layer
from duo.families._loading import freeze, load_pipeline, save_pipeline
from duo.families._sampling import as_rgb, check_rows, encode_images, layers_in, make_pipeline, new_scheduler, sample
from duo.families._text import PromptCache, embedded, place_all, span, token_ids
from duo.families._unet import SCOPES, DdpmProcess
from duo.plugins import KohyaLayer, Sampling, Span


class Sd:
    """A `StableDiffusionPipeline` with frozen weights, as `duo.plugins.Family`.

    Images come from diffusers' own pipelines, given encoded prompts. The model's scheduler config says whether it
    predicts ε or v, and whether its schedule ends in pure noise.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    component: ClassVar[str] = "unet"

    def __init__(self, pipeline: StableDiffusionPipeline, *, name: str) -> None:
        self.name = name
        self.denoiser: nn.Module = pipeline.unet
        self.device = torch.device(pipeline.device)
        side = pipeline.unet.config.sample_size
        self.latent_shape = (pipeline.unet.config.in_channels, side, side)
        self._vae: Any = pipeline.vae
        self._text_encoder: Any = pipeline.text_encoder
        self._tokenizer: Any = pipeline.tokenizer
        self._scheduler: Any = pipeline.scheduler
        self._plain = PromptCache(lambda prompt: self._encode(token_ids(self._tokenizer, prompt)))
        freeze((pipeline.unet, pipeline.vae, pipeline.text_encoder))
        self.process = DdpmProcess.of(self._scheduler, model=name, device=self.device)
        self._images = self._pipeline(StableDiffusionPipeline, None).image_processor

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
    ) -> Sd:
        """Read a diffusers folder, hub model or single checkpoint (with `config`'s settings), safetensors only.

        The safety checker is left out.
        """
        pipeline = load_pipeline(
            StableDiffusionPipeline,
            path_or_id,
            name=name,
            dtype=dtype,
            config=config,
            dropped=("safety_checker", "feature_extractor", "image_encoder"),
            requires_safety_checker=False,
        )
        return cls(pipeline.to(device), name=name)

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts, (n, length, width); differentiable in `tokens`.

        A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end.
        """
        if not tokens:
            return self._plain(prompts)
        ids, learned = place_all(self._tokenizer, prompts, tokens)
        with embedded(self._text_encoder, learned):
            return self._encode(ids)

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt: the empty prompt."""
        return self.text([""])

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), times the VAE's scaling factor."""
        return encode_images(self._vae, self._images, images, generator=generator, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The U-Net's output, in the dtype of `x_t`."""
        dtype = self._text_encoder.dtype
        output: Tensor = self.denoiser(
            x_t.to(dtype), t, encoder_hidden_states=text.embeds.to(dtype), return_dict=False
        )[0]
        return output.to(x_t.dtype)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        negative_prompts: Sequence[str] | None = None,
        tokens: Mapping[str, Tensor] | None = None,
    ) -> list[Image]:
        """Sample with diffusers' `StableDiffusionPipeline`, all prompts in one batch."""
        check_rows(prompts, seeds, negative_prompts)
        pipeline = self._pipeline(StableDiffusionPipeline, sampling.scheduler)
        return sample(pipeline, seeds=seeds, sampling=sampling, **self._texts(prompts, negative_prompts, tokens))

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
    ) -> list[Image]:
        """SDEdit with diffusers' `StableDiffusionImg2ImgPipeline`, all images in one batch."""
        check_rows(prompts, seeds, negative_prompts, images=images)
        pipeline = self._pipeline(StableDiffusionImg2ImgPipeline, sampling.scheduler)
        text = self._texts(prompts, negative_prompts, None)
        return sample(pipeline, seeds=seeds, sampling=sampling, image=as_rgb(images), strength=strength, **text)

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """Linear and Conv2d modules of the U-Net, by name: attn1, attn2, the feed-forward nets, the convolutions of
        residual blocks and of down- and upsamplers, or all."""
        return layers_in(self.denoiser, scope, SCOPES)

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [self._vae, self._text_encoder]

    def spans(self, prompt: str) -> list[Span]:
        """One, of the text encoder."""
        return [span(self._tokenizer, prompt)]

    def token_embeddings(self) -> Tensor:
        """The text encoder's table, (vocabulary, width), detached."""
        weight: Tensor = self._text_encoder.get_input_embeddings().weight
        return weight.detach()

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, length, width) of full id rows (n, length), special tokens included."""
        return self._encode(ids).embeds

    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`."""
        return self._tokenizer

    def word_parts(self) -> dict[str, int]:
        """One part, under the word's own name."""
        return {"": self.token_embeddings().shape[1]}

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the U-Net."""
        return unet_layer(layer)

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        save_pipeline(self._pipeline(StableDiffusionPipeline, None), folder)

    def _encode(self, ids: Tensor) -> Conditioning:
        return Conditioning(embeds=self._text_encoder(ids.to(self.device))[0])

    def _texts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, tokens: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Both sides of the guidance, as the pipelines take them."""
        if negative_prompts is None:
            negative = self.unconditional().expand(len(prompts))
        else:
            negative = self.text(negative_prompts)
        return {
            "prompt_embeds": self.text(prompts, tokens=tokens).embeds,
            "negative_prompt_embeds": negative.embeds,
        }

    def _pipeline(self, kind: type, scheduler: str | None) -> Any:
        return make_pipeline(
            kind,
            unet=self.denoiser,
            vae=self._vae,
            text_encoder=self._text_encoder,
            tokenizer=self._tokenizer,
            scheduler=new_scheduler(self._scheduler, scheduler, model=self.name),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
