"""Stable Diffusion XL, and any other model of diffusers' `StableDiffusionXLPipeline` (Podell et al. 2023).

Its U-Net is told the prompt's pooled embedding and, section 2.2 of the paper, sizes: here always those of the image
itself, uncropped, as the pipeline does. A learned word is one row of input embeddings for each of the two text
encoders, side by side: (vectors, width₁ + width₂). So `token_embeddings` is the two tables side by side, and Concept
Inversion learns both halves at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL.Image import Image
from torch import Tensor, nn

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.families._kohya import sgm_layer
from duo.families._loading import freeze, load_pipeline, save_pipeline
from duo.families._sampling import as_rgb, check_rows, encode_images, layers_in, make_pipeline, new_scheduler, sample
from duo.families._text import PromptCache, embedded, place_all, span, token_ids
from duo.families._unet import SCOPES, DdpmProcess
from duo.plugins import KohyaLayer, Sampling, Span


class Sdxl:
    """A `StableDiffusionXLPipeline` with frozen weights, as `duo.plugins.Family`.

    Images come from diffusers' own pipelines, given encoded prompts, without their watermark.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusionXLPipeline"})
    component: ClassVar[str] = "unet"

    def __init__(self, pipeline: StableDiffusionXLPipeline, *, name: str) -> None:
        self.name = name
        self.denoiser: nn.Module = pipeline.unet
        self.device = torch.device(pipeline.device)
        side = pipeline.unet.config.sample_size
        self.latent_shape = (pipeline.unet.config.in_channels, side, side)
        self._vae: Any = pipeline.vae
        self._encoders: list[Any] = [pipeline.text_encoder, pipeline.text_encoder_2]
        self._tokenizers: list[Any] = [pipeline.tokenizer, pipeline.tokenizer_2]
        self._scheduler: Any = pipeline.scheduler
        self._force_zeros: bool = pipeline.config.force_zeros_for_empty_prompt
        self._plain = PromptCache(lambda prompt: self._encode([token_ids(one, prompt) for one in self._tokenizers]))
        freeze((self.denoiser, self._vae, *self._encoders))
        self.process = DdpmProcess.of(self._scheduler, model=name, device=self.device)
        drawing = self._pipeline(StableDiffusionXLPipeline, None)
        self._images = drawing.image_processor
        self._pixels: int = drawing.vae_scale_factor  # a latent's side

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
    ) -> Sdxl:
        """Read a diffusers folder, hub model or single checkpoint (with `config`'s settings), safetensors only."""
        pipeline = load_pipeline(
            StableDiffusionXLPipeline,
            path_or_id,
            name=name,
            dtype=dtype,
            config=config,
            dropped=("feature_extractor", "image_encoder"),
            add_watermarker=False,
        )
        return cls(pipeline.to(device), name=name)

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts: `embeds` (n, length, width₁ + width₂), `pooled` (n, width). Differentiable in `tokens`.

        A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end. The
        empty prompt is encoded like any other; what guidance has for no prompt at all is `unconditional`.
        """
        if not tokens:
            return self._plain(prompts)
        ids = []
        with ExitStack() as hooks:
            for encoder, tokenizer, part in zip(self._encoders, self._tokenizers, self._halves(tokens), strict=True):
                rows, learned = place_all(tokenizer, prompts, part)
                hooks.enter_context(embedded(encoder, learned))
                ids.append(rows)
            return self._encode(ids)

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt: zeros, as SDXL was trained, or the
        empty prompt where the model's `force_zeros_for_empty_prompt` is false."""
        empty = self.text([""])
        if not self._force_zeros or empty.pooled is None:
            return empty
        return Conditioning(embeds=torch.zeros_like(empty.embeds), pooled=torch.zeros_like(empty.pooled))

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), times the VAE's scaling factor."""
        return encode_images(self._vae, self._images, images, generator=generator, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The U-Net's output, in the dtype of `x_t`; the sizes that it is told are those of the image."""
        if text.pooled is None:
            raise ValueError("SDXL needs the pooled embedding, and the conditioning has none")
        dtype = self._encoders[1].dtype
        height, width = (side * self._pixels for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=dtype)
        added = {"text_embeds": text.pooled.to(dtype), "time_ids": sizes.expand(len(x_t), -1)}
        output: Tensor = self.denoiser(
            x_t.to(dtype),
            t,
            encoder_hidden_states=text.embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
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
        """Sample with diffusers' `StableDiffusionXLPipeline`, all prompts in one batch."""
        check_rows(prompts, seeds, negative_prompts)
        pipeline = self._pipeline(StableDiffusionXLPipeline, sampling.scheduler)
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
        """SDEdit with diffusers' `StableDiffusionXLImg2ImgPipeline`, all images in one batch."""
        check_rows(prompts, seeds, negative_prompts, images=images)
        pipeline = self._pipeline(StableDiffusionXLImg2ImgPipeline, sampling.scheduler)
        text = self._texts(prompts, negative_prompts, None)
        return sample(pipeline, seeds=seeds, sampling=sampling, image=as_rgb(images), strength=strength, **text)

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """Linear and Conv2d modules of the U-Net, by name: attn1, attn2, the feed-forward nets, the convolutions of
        residual blocks and of down- and upsamplers, or all."""
        return layers_in(self.denoiser, scope, SCOPES)

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [self._vae, *self._encoders]

    def spans(self, prompt: str) -> list[Span]:
        """One, of both text encoders: they stand side by side."""
        return [span(self._tokenizers[0], prompt)]

    def token_embeddings(self) -> Tensor:
        """Both text encoders' tables side by side, (vocabulary, width₁ + width₂), detached."""
        if self._tokenizers[0].get_vocab() != self._tokenizers[1].get_vocab():
            raise UserError(
                f"model {self.name!r}: its two tokenizers have different vocabularies, so no learned word fits both; "
                "leave out the attacks that learn words"
            )
        return torch.cat([self._table(encoder).detach() for encoder in self._encoders], dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """The states that the U-Net is given, (n, length, width₁ + width₂), of full id rows (n, length) of the first
        tokenizer; the padding of the second is put in after the end of the text."""
        first, second = self._tokenizers
        ended = (ids == first.eos_token_id).cumsum(1)
        after = (ended > 1) | ((ended == 1) & (ids != first.eos_token_id))
        return self._encode([ids, ids.masked_fill(after, second.pad_token_id)]).embeds

    def tokenizer(self) -> Any:
        """The first `CLIPTokenizer`."""
        return self._tokenizers[0]

    def word_parts(self) -> dict[str, int]:
        """The two encoders, as trainers of learned words for SDXL name them."""
        widths = [self._table(encoder).shape[1] for encoder in self._encoders]
        return dict(zip(("clip_l", "clip_g"), widths, strict=True))

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the U-Net."""
        return sgm_layer(layer, config)

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        save_pipeline(self._pipeline(StableDiffusionXLPipeline, None), folder)

    def _encode(self, ids: Sequence[Tensor]) -> Conditioning:
        """From one id tensor (n, length) for each encoder; the pooled embedding is the second's."""
        outputs = [
            encoder(rows.to(self.device), output_hidden_states=True)
            for encoder, rows in zip(self._encoders, ids, strict=True)
        ]
        # The last layer but one, not normalised (section 2.1 of the paper follows OpenCLIP's use in SD 2).
        states = [output.hidden_states[-2] for output in outputs]
        return Conditioning(embeds=torch.cat(states, dim=-1), pooled=outputs[1].text_embeds)

    def _halves(self, tokens: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The learned words of each encoder."""
        widths = [self._table(encoder).shape[1] for encoder in self._encoders]
        for word, vectors in tokens.items():
            if vectors.shape[-1] != sum(widths):
                raise UserError(
                    f"model {self.name!r}: the learned word {word!r} has width {vectors.shape[-1]}, expected "
                    f"{widths[0]} + {widths[1]}, one part for each text encoder; learn it on this model"
                )
        parts = {word: vectors.split(widths, dim=-1) for word, vectors in tokens.items()}
        return [{word: part[i] for word, part in parts.items()} for i in range(len(widths))]

    @staticmethod
    def _table(encoder: Any) -> Tensor:
        weight: Tensor = encoder.get_input_embeddings().weight
        return weight

    def _texts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, tokens: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor | None]:
        """Both sides of the guidance, as the pipelines take them."""
        text = self.text(prompts, tokens=tokens)
        if negative_prompts is None:
            negative = self.unconditional().expand(len(prompts))
        else:
            negative = self.text(negative_prompts)
        return {
            "prompt_embeds": text.embeds,
            "pooled_prompt_embeds": text.pooled,
            "negative_prompt_embeds": negative.embeds,
            "negative_pooled_prompt_embeds": negative.pooled,
        }

    def _pipeline(self, kind: type, scheduler: str | None) -> Any:
        return make_pipeline(
            kind,
            unet=self.denoiser,
            vae=self._vae,
            text_encoder=self._encoders[0],
            text_encoder_2=self._encoders[1],
            tokenizer=self._tokenizers[0],
            tokenizer_2=self._tokenizers[1],
            scheduler=new_scheduler(self._scheduler, scheduler, model=self.name),
            force_zeros_for_empty_prompt=self._force_zeros,
            add_watermarker=False,
        )
