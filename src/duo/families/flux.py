"""FLUX.1 dev and schnell: models of diffusers' `FluxPipeline` (Black Forest Labs 2024; rectified flow)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from duo.conditioning import Conditioning
from duo.families._flow import SCOPES, FlowProcess, id_rows, reader, size_within, split_tokens, t5_table, vocabulary
from duo.families._kohya import flux_layer
from duo.families._loading import freeze, load_pipeline, save_pipeline
from duo.families._sampling import as_rgb, check_rows, encode_images, layers_in, make_pipeline, new_scheduler, sample
from duo.families._text import PromptCache, embedded, span
from duo.plugins import KohyaLayer, Sampling, Span

PATCH = 2  # latents in a token's side
# What `predict` tells a guidance-distilled model (dev): the scale that FluxPipeline samples at unless told otherwise.
# For the empty prompt, with which erasures train, guidance at any scale is the plain velocity, as `target` wants it.
GUIDANCE = 3.5
# T5 tokens: what dev and schnell were trained with.
DEV_LENGTH, SCHNELL_LENGTH = 512, 256


class Flux:
    """A `FluxPipeline` with frozen weights, as `duo.plugins.Family`: dev where it embeds guidance, else schnell.

    The denoiser reads T5 and the pooled CLIP. Latents are (n, channels, height, width) everywhere; only `predict` packs
    them. A learned word has an embedding in each encoder; its columns are CLIP and then T5.

    Guidance: without a negative prompt (an empty one is none) `guidance_scale` is what dev is told, and schnell has no
    guidance at all. With one, it is diffusers' true classifier-free guidance at that scale, at twice the cost; dev is
    then told 1, or its own guidance would come on top.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"FluxPipeline"})
    component: ClassVar[str] = "transformer"

    def __init__(self, pipeline: FluxPipeline, *, name: str) -> None:
        self.name = name
        self.denoiser: nn.Module = pipeline.transformer
        self.device = torch.device(pipeline.device)
        self._parts: dict[str, Any] = {
            part: module for part, module in pipeline.components.items() if part not in ("transformer", "scheduler")
        }
        self._scheduler: Any = pipeline.scheduler
        self._dtype: torch.dtype = pipeline.transformer.dtype
        self._guided = bool(pipeline.transformer.config.guidance_embeds)
        self._clip = (pipeline.tokenizer, pipeline.text_encoder)
        self._t5 = (pipeline.tokenizer_2, pipeline.text_encoder_2)
        self._plain = PromptCache(lambda prompt: self._encode([prompt], {}))
        self._images = pipeline.image_processor
        self._patch = pipeline.vae_scale_factor * PATCH  # a token's side in pixels
        # The one place that tells the model's image size: 1024, which is what diffusers draws whatever the model.
        side = pipeline.vae.config.sample_size
        self._size = {"height": side, "width": side}
        latent = side // pipeline.vae_scale_factor
        self.latent_shape = (pipeline.transformer.config.in_channels // PATCH**2, latent, latent)
        freeze(module for module in pipeline.components.values() if isinstance(module, nn.Module))
        self.process = FlowProcess.of(
            self._scheduler, image_tokens=(side // self._patch) ** 2, model=name, device=self.device
        )

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
    ) -> Flux:
        """Read a diffusers folder, hub model or single checkpoint (with `config`'s settings), safetensors only."""
        pipeline = load_pipeline(
            FluxPipeline,
            path_or_id,
            name=name,
            dtype=dtype,
            config=config,
            dropped=("image_encoder", "feature_extractor"),
        )
        return cls(pipeline.to(device), name=name)

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts: T5 (n, length, width) with CLIP pooled (n, pooled width); differentiable in `tokens`.

        A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end.
        """
        return self._encode(prompts, tokens) if tokens else self._plain(prompts)

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), shifted and scaled; sides are rounded down to whole patches."""
        return encode_images(self._parts["vae"], self._images, images, generator=generator, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity at noise levels `t` (σ, 0 to 1), in the dtype of `x_t`; dev is told `GUIDANCE`."""
        assert text.pooled is not None
        packed = pixel_unshuffle(x_t.to(self._dtype), PATCH)
        rows, columns = packed.shape[-2:]
        position = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        output: Tensor = self.denoiser(
            hidden_states=packed.flatten(2).transpose(1, 2),
            timestep=t,  # the transformer itself multiplies by 1000
            guidance=torch.full_like(t, GUIDANCE) if self._guided else None,
            pooled_projections=text.pooled.to(self._dtype),
            encoder_hidden_states=text.embeds.to(self._dtype),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=self.device, dtype=self._dtype),
            img_ids=position.to(self.device, self._dtype),
            return_dict=False,
        )[0]
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), PATCH).to(x_t.dtype)

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
        """Sample with diffusers' `FluxPipeline` at the image size that the VAE's config names.

        Prompts with and without a negative one make a batch each.
        """
        check_rows(prompts, seeds, negative_prompts)
        pipeline = self._pipeline(FluxPipeline, sampling.scheduler)
        return self._draw(pipeline, prompts, negative_prompts, seeds, sampling, size=self._size, tokens=tokens)

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
        """SDEdit with diffusers' `FluxImg2ImgPipeline`, at the images' size; batches as for `generate`."""
        check_rows(prompts, seeds, negative_prompts, images=images)
        pipeline = self._pipeline(FluxImg2ImgPipeline, sampling.scheduler)
        size = size_within(images, self._patch)
        return self._draw(
            pipeline, prompts, negative_prompts, seeds, sampling, size=size, images=as_rgb(images), strength=strength
        )

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """The transformer's Linear modules of a scope of `_flow.SCOPES`, by name."""
        return layers_in(self.denoiser, scope, SCOPES)

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [module for module in self._parts.values() if isinstance(module, nn.Module)]

    def spans(self, prompt: str) -> list[Span]:
        """One, of T5; CLIP is pooled."""
        return [span(self._t5[0], prompt, length=DEV_LENGTH if self._guided else SCHNELL_LENGTH)]

    def token_embeddings(self) -> Tensor:
        """The encoders' tables side by side, (CLIP's vocabulary, width), detached.

        T5 has a vocabulary of its own: its columns are the mean of its embeddings of the text of CLIP's token.
        """
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self._clip, self._t5
        table: Tensor = clip.get_input_embeddings().weight.detach()
        return torch.cat([table, t5_table(t5, t5_tokenizer, vocabulary(clip_tokenizer, len(table)))], dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """CLIP's last hidden states (n, length, width) of full id rows (n, length); the end token's is pooled."""
        states: Tensor = self._clip[1](ids.to(self.device))[0]
        return states

    def tokenizer(self) -> Any:
        """The `CLIPTokenizer`."""
        return self._clip[0]

    def word_parts(self) -> dict[str, int]:
        """The two encoders, as diffusers' trainer of learned words for FLUX names them."""
        widths = [one.get_input_embeddings().weight.shape[1] for one in (self._clip[1], self._t5[1])]
        return dict(zip(("clip_l", "t5"), widths, strict=True))

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the transformer."""
        return flux_layer(layer)

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        save_pipeline(self._pipeline(FluxPipeline, None), folder)

    def _encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Conditioning:
        lengths = self._clip[0].model_max_length, DEV_LENGTH if self._guided else SCHNELL_LENGTH
        encoders = self._clip, self._t5
        outputs = []
        for (tokenizer, encoder), own, length in zip(
            encoders, split_tokens(tokens, [encoder for _, encoder in encoders]), lengths, strict=True
        ):
            ids, learned = id_rows(tokenizer, prompts, own, length=length)
            with embedded(reader(encoder), learned):
                outputs.append(encoder(ids.to(self.device)))
        clip, t5 = outputs
        return Conditioning(embeds=t5.last_hidden_state, pooled=clip.pooler_output)

    def _draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        size: Mapping[str, int],
        tokens: Mapping[str, Tensor] | None = None,
        images: Sequence[Image] | None = None,
        **arguments: Any,
    ) -> list[Image]:
        """Images in the order of the prompts, the rows with and those without a negative prompt as a batch each.

        So the guidance of a row does not depend on its neighbours.
        """
        negatives = [""] * len(prompts) if negative_prompts is None else negative_prompts
        drawn: dict[int, Image] = {}
        for against in (False, True):
            rows = [row for row, negative in enumerate(negatives) if bool(negative) is against]
            if not rows:
                continue
            text = self.text([prompts[row] for row in rows], tokens=tokens)
            given = {"prompt_embeds": text.embeds, "pooled_prompt_embeds": text.pooled, **size, **arguments}
            if against:
                negative = self.text([negatives[row] for row in rows])
                given |= {
                    "negative_prompt_embeds": negative.embeds,
                    "negative_pooled_prompt_embeds": negative.pooled,
                    "true_cfg_scale": sampling.guidance_scale,
                }
            if images is not None:
                given["image"] = [images[row] for row in rows]
            told = replace(sampling, guidance_scale=1.0) if against else sampling
            drawn |= zip(
                rows, sample(pipeline, seeds=[seeds[row] for row in rows], sampling=told, **given), strict=True
            )
        return [drawn[row] for row in range(len(prompts))]

    def _pipeline(self, kind: type, scheduler: str | None) -> Any:
        own = new_scheduler(self._scheduler, scheduler, model=self.name)
        return make_pipeline(kind, transformer=self.denoiser, scheduler=own, **self._parts)
