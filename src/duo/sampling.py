"""Sampling by hand, for methods that train where a sampler passes: DDIM, and for rectified flow Euler's method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duo.conditioning import Conditioning
from duo.errors import UserError
from duo.plugins import Family

if TYPE_CHECKING:
    from duo.target import Target


def grid(model: Family | Target, steps: int) -> Tensor:
    """The times of `steps` even steps of the schedule, (steps,), from pure noise downwards."""
    return model.process.times(1 - torch.arange(steps) / steps)


def check_steps(model: Family, steps: int) -> None:
    """Raise `UserError` where `grid` would have a time twice: the model was trained on fewer steps."""
    known = len({*grid(model, steps).tolist()})
    if known < steps:
        raise UserError(
            f"sampling_steps is {steps}, expected at most {known}, the steps that model {model.name!r} was trained on"
        )


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
        x_t = _stepped(model, x_t, output, t, s)
    return x_t


@torch.no_grad()
def inverted(model: Family | Target, x0: Tensor, text: Conditioning, *, steps: int, rounds: int = 1) -> Tensor:
    """The starting noise (n, …) that `steps` steps make the clean latents `x0` (n, …) of: `partly_sampled` backwards.

    Each step is solved for where it came from: the x_t from which the step to the known x_s leads, without guidance.
    One round takes the output at x_s for that at x_t: where the model predicts ε, that is DDIM inversion (Song et al.
    2021, section 4.3), and for rectified flow Euler's method backwards. Each further round takes the output at the x_t
    just found (a fixed point, as in Pan et al. 2023), and so comes nearer to the exact inverse on this very grid.

    Costs steps·rounds passes of the denoiser.
    """
    times = grid(model, steps)
    x_s = x0
    for i in reversed(range(steps)):
        t = times[i].expand(len(x0))
        s = times[i + 1].expand(len(x0)) if i + 1 < steps else None  # the last step ends at the clean image
        one = torch.ones_like(x_s)
        slope = _stepped(model, one, torch.zeros_like(one), t, s)
        x_t = x_s
        for _ in range(rounds):
            output = model.predict(x_t, t, text)
            # Given the output, a step is a line: x_s = slope·x_t + (the step from 0).
            x_t = (x_s - _stepped(model, torch.zeros_like(one), output, t, s)) / slope
        x_s = x_t
    return x_s


def _stepped(model: Family | Target, x_t: Tensor, output: Tensor, t: Tensor, s: Tensor | None) -> Tensor:
    """Where the deterministic step from time t to s (None: the end) leads, given the denoiser's output at x_t."""
    x0, noise = model.process.implied(x_t, output, t)
    return x0 if s is None else model.process.noised(x0, noise, s)
