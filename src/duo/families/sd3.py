"""Stable Diffusion 3 and 3.5: models of diffusers' `StableDiffusion3Pipeline` (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.families._diffusers import DiffusersFamily
from duo.families._flow import SCOPES, FlowProcess, reader, t5_table, vocabulary
from duo.families._sampling import size_within
from duo.families._text import embedded, id_rows, one_vocabulary, repadded, span, split_tokens, table
from duo.plugins import KohyaLayer, Span

T5_LENGTH = 256  # tokens, as diffusers' pipelines have it


class Sd3(DiffusersFamily):
    """A `StableDiffusion3Pipeline`. Its T5 encoder may be missing: where the index has it as null.

    The denoiser reads both CLIP encoders side by side, then T5 (zeros where there is none), and the pooled CLIPs. A
    learned word has an embedding in each encoder; its columns are CLIP, the second CLIP and, where there is one, T5.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusion3Pipeline"})
    component: ClassVar[str] = "transformer"
    _drawing = StableDiffusion3Pipeline
    _editing = StableDiffusion3Img2ImgPipeline
    _inpainting = StableDiffusion3InpaintPipeline
    _inpainted = 16
    _scopes = SCOPES
    _optional = ("text_encoder_3", "tokenizer_3")
    _dropped = ("image_encoder", "feature_extractor")

    def __init__(self, pipeline: StableDiffusion3Pipeline, *, name: str) -> None:
        super().__init__(pipeline, name=name)
        self._config: Any = pipeline.transformer.config
        self._clips = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        self._t5 = None if pipeline.text_encoder_3 is None else (pipeline.tokenizer_3, pipeline.text_encoder_3)
        self._patch = pipeline.vae_scale_factor * self._config.patch_size  # a token's side in pixels
        self._images = VaeImageProcessor(vae_scale_factor=self._patch)
        self.process = FlowProcess.of(
            self._scheduler,
            image_tokens=(self._config.sample_size // self._config.patch_size) ** 2,
            model=name,
            device=self.device,
        )

    def predict(self, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity at noise levels `t` (σ, 0 to 1), in the dtype of `x_t`."""
        assert text.pooled is not None
        output: Tensor = self.denoiser(
            hidden_states=x_t.to(self._dtype),
            timestep=t * self._scheduler.config.num_train_timesteps,
            encoder_hidden_states=text.embeds.to(self._dtype),
            pooled_projections=text.pooled.to(self._dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def spans(self, prompt: str) -> list[Span]:
        """That of both CLIPs, which stand side by side, and that of T5 after them; without T5 zeros stand there."""
        clip = span(self.tokenizer(), prompt)
        return [clip] if self._t5 is None else [clip, span(self._t5[0], prompt, length=T5_LENGTH, offset=clip.stop)]

    def token_embeddings(self) -> Tensor:
        """The encoders' tables side by side, (CLIP's vocabulary, width), detached.

        T5 has a vocabulary of its own: its columns are the mean of its embeddings of the text of CLIP's token.
        """
        (tokenizer, first), (other, second) = self._clips
        one_vocabulary(tokenizer, other, model=self.name)
        tables = [table(first), table(second)]
        if self._t5 is not None:
            t5_tokenizer, t5 = self._t5
            tables.append(t5_table(t5, t5_tokenizer, vocabulary(tokenizer, len(tables[0]))))
        return torch.cat(tables, dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """What the denoiser reads of both CLIPs, (n, length, width), for full id rows (n, length) of the first."""
        (tokenizer, first), (other, second) = self._clips
        rows = ids, repadded(ids, tokenizer, other)
        return torch.cat([self._clip(encoder, row)[0] for encoder, row in zip((first, second), rows, strict=True)], -1)

    def word_parts(self) -> dict[str, int]:
        """None: `StableDiffusion3Pipeline` loads no learned words."""
        return {}

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """None: diffusers reads no LoRA of SD3 in kohya's scheme."""
        return None

    def _encode(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Conditioning:
        encoders = [*self._clips, *([] if self._t5 is None else [self._t5])]
        parts = split_tokens(tokens, [encoder for _, encoder in encoders])
        states, pooled = [], []
        for (tokenizer, encoder), own in zip(self._clips, parts[:2], strict=True):
            # The second encoder, too, reads as many tokens as the first tokenizer says.
            ids, learned = id_rows(tokenizer, prompts, own, length=self.tokenizer().model_max_length)
            with embedded(encoder, learned):
                state, projected = self._clip(encoder, ids)
            states.append(state)
            pooled.append(projected)
        clip = torch.cat(states, dim=-1)
        width = self._config.joint_attention_dim
        t5 = clip.new_zeros(len(prompts), T5_LENGTH, width) if self._t5 is None else self._read_t5(prompts, parts[2])
        embeds = torch.cat([pad(clip, (0, width - clip.shape[-1])).to(t5.dtype), t5], dim=1)
        return Conditioning(embeds=embeds, pooled=torch.cat(pooled, dim=-1))

    def _clip(self, encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The last but one hidden states (n, length, width) and the projected end token (n, projected width)."""
        output = encoder(ids.to(self.device), output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds

    def _read_t5(self, prompts: Sequence[str], tokens: Mapping[str, Tensor]) -> Tensor:
        assert self._t5 is not None
        tokenizer, encoder = self._t5
        ids, learned = id_rows(tokenizer, prompts, tokens, length=T5_LENGTH)
        with embedded(reader(encoder), learned):
            states: Tensor = encoder(ids.to(self.device))[0]
        return states

    def _check_size(self, width: int, height: int) -> None:
        super()._check_size(width, height)
        largest = self._config.pos_embed_max_size * self._patch
        if max(width, height) >= largest + self._patch:  # what is no whole patch is cut off
            raise UserError(
                f"an image of {width}×{height} is too large for model {self.name!r}; it takes at most {largest} a side"
            )

    def _size(self, images: Sequence[Image] | None) -> Mapping[str, int]:
        return {} if images is None else size_within(images, self._patch)
