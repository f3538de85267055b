"""Stable Diffusion 1.x and 2.x, and any other model of diffusers' `StableDiffusionPipeline` (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from torch import Tensor

from duo.conditioning import Conditioning
from duo.families._diffusers import DiffusersFamily
from duo.families._kohya import unet_layer
from duo.families._text import embedded, id_rows, table
from duo.families._unet import SCOPES, DdpmProcess
from duo.plugins import KohyaLayer


class Sd(DiffusersFamily):
    """A `StableDiffusionPipeline`, without its safety checker.

    The model's scheduler config says whether it predicts ε or v, and whether its schedule ends in pure noise.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusionPipeline"})
    component: ClassVar[str] = "unet"
    _drawing = StableDiffusionPipeline
    _editing = StableDiffusionImg2ImgPipeline
    _inpainting = StableDiffusionInpaintPipeline
    _inpainted = 4
    _scopes = SCOPES
    _dropped = ("safety_checker", "feature_extractor", "image_encoder")
    _settings: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}

    def __init__(self, pipeline: StableDiffusionPipeline, *, name: str) -> None:
        super().__init__(pipeline, name=name)
        self._text_encoder: Any = pipeline.text_encoder
        self.process = DdpmProcess.of(self._scheduler, model=name, device=self.device)

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The U-Net's output, in the dtype of `x_t`."""
        output: Tensor = self.denoiser(
            x_t.to(self._dtype), t, encoder_hidden_states=text.embeds.to(self._dtype), return_dict=False
        )[0]
        return output.to(x_t.dtype)

    def token_embeddings(self) -> Tensor:
        """The text encoder's table, (vocabulary, width), detached."""
        return table(self._text_encoder)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Last hidden states (n, length, width) of full id rows (n, length), special tokens included."""
        return self._states(ids)

    def word_parts(self) -> dict[str, int]:
        """One part, under the word's own name."""
        return {"": self.token_embeddings().shape[1]}

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """Where kohya's LoRA files keep a layer of the U-Net."""
        return unet_layer(layer)

    def _encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Conditioning:
        ids, learned = id_rows(self.tokenizer(), prompts, tokens)
        with embedded(self._text_encoder, learned):
            return Conditioning(embeds=self._states(ids))

    def _states(self, ids: Tensor) -> Tensor:
        states: Tensor = self._text_encoder(ids.to(self.device))[0]
        return states
