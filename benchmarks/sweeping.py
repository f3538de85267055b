"""An experiment: several strengths of a sweep trained at once on the same draws, with one reference pass for all.

`apart` is what is shipped, each strength with passes of its own. Losses are the same; it is not shipped because a
search of the strength (docs/strength.md) tries one value after another, each from what the one before showed.
"""

from __future__ import annotations

import time

import torch
from speed_training import BATCH, RANK, SCOPE, SEED, objective, our_steps
from torch import nn

from duo.drawn import encode
from duo.pairs import Pairs
from duo.plugins import Family
from duo.training import attach_lora

STRENGTHS = 4


def apart(model: Family, pairs: Pairs, *, steps: int = 2) -> float:
    """Seconds a step of all strengths."""
    return sum(our_steps(model, pairs, steps=steps)[0] for _ in range(STRENGTHS))


def together(model: Family, pairs: Pairs, *, steps: int = 2) -> float:
    """The same with one reference pass."""
    layers, process = sorted(name for scope in SCOPE for name in model.layers(scope)), model.process
    generator = torch.Generator().manual_seed(SEED)
    unsafe, safe = (encode(model, side) for side in (pairs.unsafe, pairs.safe))
    text = model.unconditional().expand(3 * BATCH)
    with attach_lora(model.denoiser, layers, rank=RANK, alpha=float(RANK), seed=SEED) as lora:
        parameters = list(lora.parameters)
        weights = [[one.detach().clone() for one in parameters] for _ in range(STRENGTHS)]
        optimisers = [
            torch.optim.AdamW([nn.Parameter(one) for one in own], lr=1e-4 * (number + 1))
            for number, own in enumerate(weights)
        ]
        start = time.perf_counter()
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            chosen = torch.randperm(len(unsafe), generator=generator)[:BATCH]
            noise = torch.randn(BATCH, *unsafe.shape[1:], generator=generator)
            t = process.sample_t(2 * BATCH, low=0.0, high=0.75, generator=generator)
            x0, eps = torch.cat([unsafe[chosen], safe[chosen]]), noise.repeat(2, 1, 1, 1)
            terminal, last = process.terminal(noise)
            x_t, times = torch.cat([process.noised(x0, eps, t), terminal]), torch.cat([t, last])
            target = process.target(x0, eps, t)
            with lora.disabled():
                reference = model.predict(x_t, times, text)
            for optimiser in optimisers:
                own = optimiser.param_groups[0]["params"]
                for parameter, one in zip(parameters, own, strict=True):
                    parameter.data, parameter.grad = one.data, None
                objective(model.predict(x_t, times, text), reference, target, prior=True)[0].backward()
                for parameter, one in zip(parameters, own, strict=True):
                    one.grad = parameter.grad
                nn.utils.clip_grad_norm_(own, 1.0)
                optimiser.step()
        return (time.perf_counter() - start) / steps
