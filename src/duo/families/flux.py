"""FLUX.1 dev and schnell: models of diffusers' `FluxPipeline` (Black Forest Labs 2024; rectified flow)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from duo.conditioning import Conditioning
from duo.families._diffusers import DiffusersFamily
from duo.families._flow import SCOPES, FlowProcess, reader, t5_table, vocabulary
from duo.families._kohya import flux_layer
from duo.families._sampling import sample, size_within
from duo.families._text import embedded, id_rows, span, split_tokens, table
from duo.plugins import KohyaLayer, Sampling, Span

PATCH = 2  # latents in a token's side
# What `predict` tells a guidance-distilled model (dev): the scale that FluxPipeline samples at unless told otherwise.
# For the empty prompt, with which erasures train, guidance at any scale is the plain velocity, as `target` wants it.
GUIDANCE = 3.5
# T5 tokens: what dev and schnell were trained with.
DEV_LENGTH, SCHNELL_LENGTH = 512, 256


def packed(latents: Tensor) -> Tensor:
    """(n, channels, height, width) as the denoiser reads it: (n, tokens, channels·PATCH²)."""
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


class Flux(DiffusersFamily):
    """A `FluxPipeline`: dev where it embeds guidance, else schnell.

    The denoiser reads T5 and the pooled CLIP. Latents are (n, channels, height, width) everywhere; only what is handed
    to diffusers is packed. A learned word has an embedding in each encoder; its columns are CLIP and then T5.

    Guidance: without a negative prompt (an empty one is none) `guidance_scale` is what dev is told, and schnell has no
    guidance at all. With one, it is diffusers' true classifier-free guidance at that scale, at twice the cost; dev is
    then told 1, or its own guidance would come on top. Prompts with and without a negative one make a batch each, so
    that the guidance of a row does not depend on its neighbours. New images have the size that the VAE's config names.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"FluxPipeline"})
    component: ClassVar[str] = "transformer"
    _drawing = FluxPipeline
    _editing = FluxImg2ImgPipeline
    _inpainting = FluxInpaintPipeline
    _scopes = SCOPES
    _dropped = ("image_encoder", "feature_extractor")

    def __init__(self, pipeline: FluxPipeline, *, name: str) -> None:
        super().__init__(pipeline, name=name)
        self._guided = bool(pipeline.transformer.config.guidance_embeds)
        self._clip = (pipeline.tokenizer, pipeline.text_encoder)
        self._t5 = (pipeline.tokenizer_2, pipeline.text_encoder_2)
        self._patch = pipeline.vae_scale_factor * PATCH  # a token's side in pixels
        # The one place that tells the model's image size: 1024, which is what diffusers draws whatever the model.
        self._side: int = pipeline.vae.config.sample_size
        self.process = FlowProcess.of(
            self._scheduler, image_tokens=(self._side // self._patch) ** 2, model=name, device=self.device
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent that is not packed, at the model's own image size."""
        config: Any = self.denoiser.config
        side = PATCH * self._side // self._patch
        return config.in_channels // PATCH**2, side, side

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity at noise levels `t` (σ, 0 to 1), in the dtype of `x_t`; dev is told `GUIDANCE`."""
        assert text.pooled is not None
        rows, columns = (side // PATCH for side in x_t.shape[-2:])
        position = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        output: Tensor = self.denoiser(
            hidden_states=packed(x_t.to(self._dtype)),
            timestep=t,  # the transformer itself multiplies by 1000
            guidance=torch.full_like(t, GUIDANCE) if self._guided else None,
            pooled_projections=text.pooled.to(self._dtype),
            encoder_hidden_states=text.embeds.to(self._dtype),
            txt_ids=torch.zeros(text.embeds.shape[1], 3, device=self.device, dtype=self._dtype),
            img_ids=position.to(self.device, self._dtype),
            return_dict=False,
        )[0]
        return pixel_shuffle(output.transpose(1, 2).unflatten(2, (rows, columns)), PATCH).to(x_t.dtype)

    def spans(self, prompt: str) -> list[Span]:
        """One, of T5; CLIP is pooled."""
        return [span(self._t5[0], prompt, length=DEV_LENGTH if self._guided else SCHNELL_LENGTH)]

    def token_embeddings(self) -> Tensor:
        """The encoders' tables side by side, (CLIP's vocabulary, width), detached.

        T5 has a vocabulary of its own: its columns are the mean of its embeddings of the text of CLIP's token.
        """
        (clip_tokenizer, clip), (t5_tokenizer, t5) = self._clip, self._t5
        own = table(clip)
        return torch.cat([own, t5_table(t5, t5_tokenizer, vocabulary(clip_tokenizer, len(own)))], dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """CLIP's last hidden states (n, length, width) of full id rows (n, length); the end token's is pooled."""
        states: Tensor = self._clip[1](ids.to(self.device))[0]
        return states

    def word_parts(self) -> dict[str, int]:
        """The two encoders, as diffusers' trainer of learned words for FLUX names them."""
        widths = [table(one).shape[1] for one in (self._clip[1], self._t5[1])]
        return dict(zip(("clip_l", "t5"), widths, strict=True))

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the transformer."""
        return flux_layer(layer)

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

    def _size(self, images: Sequence[Image] | None) -> Mapping[str, int]:
        return {"height": self._side, "width": self._side} if images is None else size_within(images, self._patch)

    def _draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        sampling: Sampling,
        tokens: Mapping[str, Tensor] | None = None,
        latents: Tensor | None = None,
        **given: Any,
    ) -> list[Image]:
        """Images in the order of the prompts, the rows with and those without a negative prompt as a batch each."""
        negatives = [""] * len(prompts) if negative_prompts is None else negative_prompts
        by_row = {name: given.pop(name) for name in ("image", "mask_image") if name in given}
        drawn: dict[int, Image] = {}
        for against in (False, True):
            rows = [row for row, negative in enumerate(negatives) if bool(negative) is against]
            if not rows:
                continue
            text = self.text([prompts[row] for row in rows], tokens=tokens)
            own = {"prompt_embeds": text.embeds, "pooled_prompt_embeds": text.pooled, **given}
            if against:
                negative = self.text([negatives[row] for row in rows])
                own |= {
                    "negative_prompt_embeds": negative.embeds,
                    "negative_pooled_prompt_embeds": negative.pooled,
                    "true_cfg_scale": sampling.guidance_scale,
                }
            own |= {name: [values[row] for row in rows] for name, values in by_row.items()}
            if latents is not None:
                own["latents"] = packed(latents[rows])
            told = replace(sampling, guidance_scale=1.0) if against else sampling
            drawn |= zip(rows, sample(pipeline, seeds=[seeds[row] for row in rows], sampling=told, **own), strict=True)
        return [drawn[row] for row in range(len(prompts))]
