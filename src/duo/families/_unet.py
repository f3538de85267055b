"""What the families with a U-Net share: the process of DDPM, and where the layers of a scope lie."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duo.errors import UserError

# Where the modules of a scope lie in a UNet2DConditionModel. Time embeddings, the 1×1 projections around the
# transformer blocks and the first and last convolution belong to no scope but "all".
SCOPES = {
    "self_attention": re.compile(r"\.attn1\."),
    "cross_attention": re.compile(r"\.attn2\."),
    "attention": re.compile(r"\.attn[12]\."),
    "feed_forward": re.compile(r"\.ff\.net\."),
    "text_inputs": re.compile(r"\.attn2\.to_[kv]$"),
    "transformers": re.compile(r"(^|\.)attentions\."),
    "convolutions": re.compile(r"\.(resnets|downsamplers|upsamplers)\.\d+\.conv"),
    "all": re.compile(""),
}


@dataclass(frozen=True, kw_only=True)
class DdpmProcess:
    """The variance-preserving process of DDPM (Ho et al. 2020, eq. 4) in T discrete steps.

    `alphas_cumprod` is ᾱ, (T,), in float32 on the denoiser's device; times are int64, (n,), 0 the cleanest.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any, *, model: str, device: torch.device) -> DdpmProcess:
        """The process that the model's scheduler samples from, a zero terminal SNR (Lin et al. 2024) included."""
        alphas = getattr(scheduler, "alphas_cumprod", None)
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if alphas is None or prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"model {model!r}: a {type(scheduler).__name__} with prediction_type {prediction_type!r} is not "
                "supported; it must have alphas_cumprod and predict epsilon or v_prediction"
            )
        return cls(alphas_cumprod=alphas.to(device, torch.float32), prediction_type=prediction_type)

    def sample_t(self, n: int, *, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Draw `n` of the steps low·T … high·T − 1 uniformly."""
        steps = len(self.alphas_cumprod)
        first, end = round(low * steps), round(high * steps)
        if first >= end:
            raise UserError(f"timestep_range: none of the {steps} steps lies between {low} and {high}; widen it")
        t = torch.randint(first, end, (n,), generator=generator, device=generator.device)
        return t.to(self.alphas_cumprod.device)

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """√ᾱ·x0 + √(1 − ᾱ)·eps."""
        signal, noise = self._scales(t, x0)
        return signal * x0 + noise * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the denoiser was trained to predict: ε, or v = √ᾱ·ε − √(1 − ᾱ)·x0 (Salimans & Ho 2022)."""
        if self.prediction_type == "epsilon":
            return eps
        signal, noise = self._scales(t, x0)
        return signal * eps - noise * x0

    def implied(self, x_t: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps from ε or v. At a zero terminal SNR ε implies no x0: it is 0/0 there."""
        signal, noise = self._scales(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - noise * output) / signal, output
        return signal * x_t - noise * output, noise * x_t + signal * output

    def times(self, fractions: Tensor) -> Tensor:
        """Step f·T − 1, and at least 0."""
        last = (fractions * len(self.alphas_cumprod)).round().long() - 1
        return last.clamp(min=0).to(self.alphas_cumprod.device)

    def terminal(self, eps: Tensor, *, at: float = 1.0) -> tuple[Tensor, Tensor]:
        """Pure noise at step T − 1, not scaled by √(1 − ᾱ): the end of the schedule. `at` labels it at·T − 1.

        Samplers with trailing or linspace spacing start there, and the authors' code for DUO takes its prior there.
        Samplers with leading spacing, Stable Diffusion's own among them, start below: at step 981 of 1000 where they
        take 50 steps with an offset of 1.
        """
        return eps, self.times(torch.full((len(eps),), at))

    def x0_scale(self, t: Tensor) -> Tensor:
        """√(1 − ᾱ)/√ᾱ for ε, and √(1 − ᾱ) for v, as x0 = √ᾱ·x_t − √(1 − ᾱ)·v."""
        alphas = self.alphas_cumprod[t]
        noise = (1 - alphas).sqrt()
        return noise / alphas.sqrt() if self.prediction_type == "epsilon" else noise

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))
        return alphas.sqrt(), (1 - alphas).sqrt()
