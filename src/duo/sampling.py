"""Sampling by hand, for methods that train where a sampler passes: DDIM, and for rectified flow Euler's method."""

from __future__ import annotations

import torch
from torch import Tensor

from duo.conditioning import Conditioning
from duo.plugins import Family


def grid(model: Family, steps: int) -> Tensor:
    """The times of `steps` even steps of the schedule, (steps,), from pure noise downwards."""
    return model.process.times(1 - torch.arange(steps) / steps)


def guided(
    model: Family, x_t: Tensor, t: Tensor, text: Conditioning, unconditional: Conditioning, *, scale: float
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): u + scale·(c − u), in one pass of the denoiser; at 1, c alone."""
    if scale == 1:
        return model.predict(x_t, t, text)
    both = Conditioning.cat([unconditional, text])
    u, c = model.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return u + scale * (c - u)


@torch.no_grad()
def partly_sampled(
    model: Family,
    eps: Tensor,
    text: Conditioning,
    unconditional: Conditioning,
    *,
    steps: int,
    stop: int,
    guidance_scale: float,
) -> Tensor:
    """What starting noise `eps` (n, …) has become after `stop` of `steps` steps, at time `grid(model, steps)[stop]`.

    Each step is deterministic: from time t to s, x_s is the clean image and the noise that the prediction at x_t
    implies, put together anew (DDIM with η = 0, Song et al. 2021, eq. 12; for rectified flow that is Euler's method).
    """
    times = grid(model, steps)
    x_t, _ = model.process.terminal(eps)
    for i in range(stop):
        t, s = (times[k].expand(len(eps)) for k in (i, i + 1))
        output = guided(model, x_t, t, text, unconditional, scale=guidance_scale)
        x0, noise = model.process.implied(x_t, output, t)
        x_t = model.process.noised(x0, noise, s)
    return x_t
