"""Stable Diffusion 3 and 3.5: models of diffusers' `StableDiffusion3Pipeline` (Esser et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.families._flow import SCOPES, FlowProcess, id_rows, reader, size_within, split_tokens, t5_table, vocabulary
from duo.families._loading import freeze, load_pipeline, save_pipeline
from duo.families._sampling import as_rgb, check_rows, encode_images, layers_in, make_pipeline, new_scheduler, sample
from duo.families._text import PromptCache, embedded, span
from duo.plugins import KohyaLayer, Sampling, Span

T5_LENGTH = 256  # tokens, as diffusers' pipelines have it


class Sd3:
    """A `StableDiffusion3Pipeline` with frozen weights, as `duo.plugins.Family`. Its T5 encoder may be missing.

    The denoiser reads both CLIP encoders side by side, then T5 (zeros where there is none), and the pooled CLIPs. A
    learned word has an embedding in each encoder; its columns are CLIP, the second CLIP and, where there is one, T5.
    """

    pipelines: ClassVar[frozenset[str]] = frozenset({"StableDiffusion3Pipeline"})
    component: ClassVar[str] = "transformer"

    def __init__(self, pipeline: StableDiffusion3Pipeline, *, name: str) -> None:
        self.name = name
        self.denoiser: nn.Module = pipeline.transformer
        self.device = torch.device(pipeline.device)
        self._parts: dict[str, Any] = {
            part: module for part, module in pipeline.components.items() if part not in ("transformer", "scheduler")
        }
        self._scheduler: Any = pipeline.scheduler
        self._config: Any = pipeline.transformer.config
        self.latent_shape = (self._config.in_channels, self._config.sample_size, self._config.sample_size)
        self._dtype: torch.dtype = pipeline.transformer.dtype
        self._clips = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        self._t5 = None if pipeline.text_encoder_3 is None else (pipeline.tokenizer_3, pipeline.text_encoder_3)
        self._plain = PromptCache(lambda prompt: self._encode([prompt], {}))
        self._patch = pipeline.vae_scale_factor * self._config.patch_size  # a token's side in pixels
        self._images = VaeImageProcessor(vae_scale_factor=self._patch)
        freeze(module for module in pipeline.components.values() if isinstance(module, nn.Module))
        self.process = FlowProcess.of(
            self._scheduler,
            image_tokens=(self._config.sample_size // self._config.patch_size) ** 2,
            model=name,
            device=self.device,
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
    ) -> Sd3:
        """Read a diffusers folder, hub model or single checkpoint (with `config`'s settings), safetensors only.

        T5 is left out where the index has it as null.
        """
        pipeline = load_pipeline(
            StableDiffusion3Pipeline,
            path_or_id,
            name=name,
            dtype=dtype,
            config=config,
            optional=("text_encoder_3", "tokenizer_3"),
            dropped=("image_encoder", "feature_extractor"),
        )
        return cls(pipeline.to(device), name=name)

    def text(self, prompts: Sequence[str], *, tokens: Mapping[str, Tensor] | None = None) -> Conditioning:
        """Encode prompts, (n, length, width) with pooled (n, pooled width); differentiable in `tokens`.

        A placeholder stands for its k vectors wherever it occurs as a whole word. A prompt too long loses its end.
        """
        return self._encode(prompts, tokens) if tokens else self._plain(prompts)

    def latents(self, images: Sequence[Image], *, generator: torch.Generator | None) -> Tensor:
        """VAE-encode to (n, channels, height, width), shifted and scaled; sides are rounded down to whole patches."""
        return encode_images(self._parts["vae"], self._images, images, generator=generator, device=self.device)

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
        """Sample with diffusers' `StableDiffusion3Pipeline`, all prompts in one batch."""
        check_rows(prompts, seeds, negative_prompts)
        pipeline = self._pipeline(StableDiffusion3Pipeline, sampling.scheduler)
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
        """SDEdit with diffusers' `StableDiffusion3Img2ImgPipeline`, all images in one batch, at the images' size."""
        check_rows(prompts, seeds, negative_prompts, images=images)
        pipeline = self._pipeline(StableDiffusion3Img2ImgPipeline, sampling.scheduler)
        text = self._texts(prompts, negative_prompts, None)
        size = size_within(images, self._patch)
        return sample(pipeline, seeds=seeds, sampling=sampling, image=as_rgb(images), strength=strength, **size, **text)

    def layers(self, scope: str) -> dict[str, nn.Module]:
        """The transformer's Linear and Conv2d modules of a scope of `_flow.SCOPES`, by name."""
        return layers_in(self.denoiser, scope, SCOPES)

    def encoders(self) -> list[nn.Module]:
        """The VAE and the text encoders."""
        return [module for module in self._parts.values() if isinstance(module, nn.Module)]

    def spans(self, prompt: str) -> list[Span]:
        """That of both CLIPs, which stand side by side, and that of T5 after them; without T5 zeros stand there."""
        clip = span(self.tokenizer(), prompt)
        return [clip] if self._t5 is None else [clip, span(self._t5[0], prompt, length=T5_LENGTH, offset=clip.stop)]

    def token_embeddings(self) -> Tensor:
        """The encoders' tables side by side, (CLIP's vocabulary, width), detached.

        T5 has a vocabulary of its own: its columns are the mean of its embeddings of the text of CLIP's token.
        """
        if self._clips[0][0].get_vocab() != self._clips[1][0].get_vocab():
            raise UserError(
                f"model {self.name!r}: its CLIP tokenizers have different vocabularies, so no learned word fits both; "
                "leave out the attacks that learn words"
            )
        tables = [encoder.get_input_embeddings().weight.detach() for _, encoder in self._clips]
        if self._t5 is not None:
            tokenizer, encoder = self._t5
            tables.append(t5_table(encoder, tokenizer, vocabulary(self.tokenizer(), len(tables[0]))))
        return torch.cat(tables, dim=1)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """What the denoiser reads of both CLIPs, (n, length, width), for full id rows (n, length) of the first."""
        (tokenizer, first), (other, second) = self._clips
        ended = (ids == tokenizer.eos_token_id).cumsum(1) - (ids == tokenizer.eos_token_id).int() > 0
        repadded = ids.masked_fill(ended, other.pad_token_id)  # the second CLIP pads with another token
        states = [self._clip(encoder, row)[0] for encoder, row in ((first, ids), (second, repadded))]
        return torch.cat(states, dim=-1)

    def tokenizer(self) -> Any:
        """The first `CLIPTokenizer`."""
        return self._clips[0][0]

    def word_parts(self) -> dict[str, int]:
        """None: `StableDiffusion3Pipeline` loads no learned words."""
        return {}

    @staticmethod
    def kohya(layer: str, config: Mapping[str, Any]) -> KohyaLayer | None:
        """None: diffusers reads no LoRA of SD3 in kohya's scheme."""
        return None

    def save(self, folder: Path) -> None:
        """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
        save_pipeline(self._pipeline(StableDiffusion3Pipeline, None), folder)

    # --- text ---------------------------------------------------------------------------------------

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

    # --- sampling -----------------------------------------------------------------------------------

    def _texts(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, tokens: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor | None]:
        """Both sides of the guidance, as the pipelines take them."""
        text = self.text(prompts, tokens=tokens)
        negative = self.text([""] * len(prompts) if negative_prompts is None else negative_prompts)
        return {
            "prompt_embeds": text.embeds,
            "pooled_prompt_embeds": text.pooled,
            "negative_prompt_embeds": negative.embeds,
            "negative_pooled_prompt_embeds": negative.pooled,
        }

    def _pipeline(self, kind: type, scheduler: str | None) -> Any:
        own = new_scheduler(self._scheduler, scheduler, model=self.name)
        return make_pipeline(kind, transformer=self.denoiser, scheduler=own, **self._parts)
