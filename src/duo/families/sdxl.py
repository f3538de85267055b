"""Stable Diffusion XL, and any other model of diffusers' `StableDiffusionXLPipeline` (Podell et al. 2023).

Its U-Net is told the prompt's pooled embedding and, section 2.2 of the paper, sizes: here always those of the image
itself, uncropped, as the pipeline does. A learned word is one row of input embeddings for each of the two text
encoders, side by side: (vectors, width₁ + width₂). So `token_embeddings` is the two tables side by side, and Concept
Inversion learns both halves at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline
from torch import Tensor

from duo.conditioning import Conditioning
from duo.families._diffusers import DiffusersFamily
from duo.families._kohya import sgm_layer
from duo.families._text import embedded, id_rows, one_vocabulary, repadded, split_tokens, table
from duo.families._unet import SCOPES, DdpmProcess
from duo.plugins import KohyaLayer


class Sdxl(DiffusersFamily):
    """A `StableDiffusionXLPipeline`, without its watermark.

    `text` encodes the empty prompt like any other; what guidance has for no prompt at all is `unconditional`.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusionXLPipeline"})
    component: ClassVar[str] = "unet"
    _drawing = StableDiffusionXLPipeline
    _editing = StableDiffusionXLImg2ImgPipeline
    _inpainting = StableDiffusionXLInpaintPipeline
    _inpainted = 4
    _scopes = SCOPES
    _dropped = ("feature_extractor", "image_encoder")
    _settings: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}

    def __init__(self, pipeline: StableDiffusionXLPipeline, *, name: str) -> None:
        super().__init__(pipeline, name=name)
        self._encoders: list[Any] = [pipeline.text_encoder, pipeline.text_encoder_2]
        self._tokenizers: list[Any] = [pipeline.tokenizer, pipeline.tokenizer_2]
        self._parts["force_zeros_for_empty_prompt"] = pipeline.config.force_zeros_for_empty_prompt
        self._pixels: int = pipeline.vae_scale_factor  # a latent's side
        self.process = DdpmProcess.of(self._scheduler, model=name, device=self.device)

    def unconditional(self) -> Conditioning:
        """The one row that guidance starts from where there is no negative prompt: zeros, as SDXL was trained, or the
        empty prompt where the model's `force_zeros_for_empty_prompt` is false."""
        empty = super().unconditional()
        if not self._parts["force_zeros_for_empty_prompt"] or empty.pooled is None:
            return empty
        return Conditioning(embeds=torch.zeros_like(empty.embeds), pooled=torch.zeros_like(empty.pooled))

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The U-Net's output, in the dtype of `x_t`; the sizes that it is told are those of the image."""
        if text.pooled is None:
            raise ValueError("SDXL needs the pooled embedding, and the conditioning has none")
        height, width = (side * self._pixels for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=x_t.device, dtype=self._dtype)
        added = {"text_embeds": text.pooled.to(self._dtype), "time_ids": sizes.expand(len(x_t), -1)}
        output: Tensor = self.denoiser(
            x_t.to(self._dtype),
            t,
            encoder_hidden_states=text.embeds.to(self._dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def token_embeddings(self) -> Tensor:
        """Both text encoders' tables side by side, (vocabulary, width₁ + width₂), detached."""
        one_vocabulary(*self._tokenizers, model=self.name)
        return torch.cat([table(encoder) for encoder in self._encoders], dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """The states that the U-Net is given, (n, length, width₁ + width₂), of full id rows (n, length) of the first
        tokenizer; the padding of the second is put in after the end of the text."""
        return self._read([ids, repadded(ids, *self._tokenizers)]).embeds

    def word_parts(self) -> dict[str, int]:
        """The two encoders, as trainers of learned words for SDXL name them."""
        widths = [table(encoder).shape[1] for encoder in self._encoders]
        return dict(zip(("clip_l", "clip_g"), widths, strict=True))

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the U-Net."""
        return sgm_layer(layer, config)

    def _encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Conditioning:
        parts = split_tokens(tokens, self._encoders, model=self.name)
        rows = []
        with ExitStack() as hooks:
            for encoder, tokenizer, own in zip(self._encoders, self._tokenizers, parts, strict=True):
                ids, learned = id_rows(tokenizer, prompts, own)
                hooks.enter_context(embedded(encoder, learned))
                rows.append(ids)
            return self._read(rows)

    def _read(self, ids: Sequence[Tensor]) -> Conditioning:
        """From one id tensor (n, length) for each encoder; the pooled embedding is the second's."""
        outputs = [
            encoder(rows.to(self.device), output_hidden_states=True)
            for encoder, rows in zip(self._encoders, ids, strict=True)
        ]
        # The last layer but one, not normalised (section 2.1 of the paper follows OpenCLIP's use in SD 2).
        states = [output.hidden_states[-2] for output in outputs]
        return Conditioning(embeds=torch.cat(states, dim=-1), pooled=outputs[1].text_embeds)
