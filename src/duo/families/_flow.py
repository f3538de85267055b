"""What the families with a multimodal transformer share: rectified flow, layer scopes, T5."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import T5EncoderModel

from duo.errors import UserError
from duo.families._text import table

# Where the modules of a scope lie in an SD3Transformer2DModel or FluxTransformer2DModel. The published choice of DUO is
# every to_q, to_k, to_v and to_out.0, here "self_attention": the image's side of the joint attention, SD3.5's second
# attention, and FLUX's single blocks, where image and text are one stream. The text's side is "joint_attention". The
# output of a single block serves attention and feed-forward at once, and is counted as feed-forward.
_OWN = r"\.attn2?\.(to_[qkv]|to_out\.0)$"
_ADDED = r"\.attn\.(add_[qkv]_proj|to_add_out)$"
SCOPES = {
    "self_attention": re.compile(_OWN),
    "joint_attention": re.compile(_ADDED),
    "attention": re.compile(f"{_OWN}|{_ADDED}"),
    "feed_forward": re.compile(r"\.(ff|ff_context)\.net\.|^single_transformer_blocks\.\d+\.proj_(mlp|out)$"),
    "text_inputs": re.compile(r"^context_embedder$|^time_text_embed\.text_embedder\.linear_1$"),
    "transformers": re.compile(r"^(single_)?transformer_blocks\."),
    "all": re.compile(""),
}


@dataclass(frozen=True, kw_only=True)
class FlowProcess:
    """Rectified flow (Liu et al. 2023; Esser et al. 2024, eq. 13): x_t = (1 − σ)·x0 + σ·eps, with velocity eps − x0.

    Times are σ itself, (n,), float32 on `device`: 0 is clean, 1 pure noise, and samplers start at 1. (diffusers' flow
    schedulers hold 1000·σ and run from noise to clean: their index 0 is σ = 1.)

    A fraction u of the schedule lies at σ = shift·u / (1 + (shift − 1)·u), the scheduler's own shift. It is applied so
    that fractions mean here what they mean for DDPM: the sampler spends a share u of its steps below that σ, and SDEdit
    of strength u starts there.
    """

    shift: float
    device: torch.device

    @classmethod
    def of(cls, scheduler: Any, *, image_tokens: int, model: str, device: torch.device) -> FlowProcess:
        """The process that the model's scheduler samples from.

        A dynamic shift depends on the image's size; it is taken at `image_tokens`, that of the model's own size.
        """
        config = scheduler.config
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.invert_sigmas:
            inverted = " with invert_sigmas" if config.get("invert_sigmas") else ""
            raise UserError(
                f"model {model!r}: a {type(scheduler).__name__}{inverted} is not supported; "
                "it must be a FlowMatchEulerDiscreteScheduler that runs from σ = 1 to 0"
            )
        if not config.use_dynamic_shifting:
            return cls(shift=float(config.shift), device=device)
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (image_tokens - config.base_image_seq_len)
        return cls(shift=math.exp(mu) if config.time_shift_type == "exponential" else mu, device=device)

    def sigma(self, fraction: Tensor) -> Tensor:
        """The noise level at a fraction of the schedule."""
        return self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Draw `n` fractions uniformly between `low` and `high`, as noise levels."""
        u = torch.rand(n, generator=generator, device=generator.device)
        return self.sigma(low + (high - low) * u).to(self.device)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(1 − σ)·x0 + σ·eps."""
        sigma = t.view(-1, *[1] * (x0.dim() - 1))
        return (1 - sigma).to(x0.dtype) * x0 + sigma.to(x0.dtype) * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The velocity eps − x0, the same at every σ."""
        return eps - x0

    def implied(self, x_t: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t − σ·velocity and x_t + (1 − σ)·velocity."""
        sigma = t.view(-1, *[1] * (x_t.dim() - 1)).to(x_t.dtype)
        return x_t - sigma * output, x_t + (1 - sigma) * output

    def times(self, fractions: Tensor) -> Tensor:
        """The σ at these fractions, shifted; 1 is exactly 1."""
        fractions = fractions.float()
        return torch.where(fractions == 1, fractions, self.sigma(fractions)).to(self.device)

    def terminal(self, eps: Tensor, *, at: float = 1.0) -> tuple[Tensor, Tensor]:
        """Pure noise at σ = 1: what a sampler is handed first. `at` labels it with another fraction's σ."""
        return eps, self.times(torch.full((len(eps),), at))

    def x0_scale(self, t: Tensor) -> Tensor:
        """σ, for x0 = x_t − σ·velocity."""
        return t


def reader(encoder: Any) -> Any:
    """The module whose input embeddings are read: `T5EncoderModel`'s own are tied to them, and never called."""
    return encoder.encoder if isinstance(encoder, T5EncoderModel) else encoder


def t5_table(encoder: Any, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """For each word the mean of its T5 token embeddings, (words, width), detached; zeros where it has no token."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids if word else [] for word in words]
    own = table(encoder)
    lengths = torch.tensor([0, *(len(row) for row in ids[:-1])], device=own.device)
    flat = torch.tensor([one for row in ids for one in row], dtype=torch.long, device=own.device)
    return embedding_bag(flat, own, lengths.cumsum(0), mode="mean")


def vocabulary(tokenizer: Any, size: int) -> list[str]:
    """The text of each of the first `size` ids."""
    return [tokenizer.decode([one]).strip() for one in range(size)]
