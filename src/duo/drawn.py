"""Images that a method draws for itself, by the model that it is about to change: as latents, and noised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from duo import parallel, rundir
from duo.plugins import Family, Process, Run
from duo.seeds import seed_for

DRAWN_AT_ONCE = 16
ENCODED_AT_ONCE = 8  # images a pass of the VAE


def draw(
    model: Family,
    prompts: Sequence[str],
    *,
    n: int,
    run: Run,
    name: str,
    negative_prompts: Sequence[str] | None = None,
    guidance_scale: float | None = None,
) -> list[Image.Image]:
    """`n` images of `prompts`, in turn, sampled as the run samples (at another `guidance_scale` where given).

    They are kept in the run's folder `name`, so that a run that was stopped goes on; image i has a seed of its own,
    derived from the run's, `name` and i. Negative prompts belong to the prompts one by one.
    """
    folder = run.folder / name
    sampling = run.sampling if guidance_scale is None else replace(run.sampling, guidance_scale=guidance_scale)
    with run.progress(n, name) as bar:
        for rows in parallel.mine(rundir.blocks(n, DRAWN_AT_ONCE)):
            if not all(_path(folder, i).exists() for i in rows):
                images = model.generate(
                    [prompts[i % len(prompts)] for i in rows],
                    seeds=[seed_for(run.seed, name, i) for i in rows],
                    sampling=sampling,
                    negative_prompts=negative_prompts and [negative_prompts[i % len(prompts)] for i in rows],
                )
                for i, image in zip(rows, images, strict=True):
                    rundir.write_image(_path(folder, i), image)
            bar.update(rows.stop)
    parallel.barrier()
    return [rundir.read_image(_path(folder, i), remedy="remove it, and go on") for i in range(n)]


def encode(model: Family, images: Any) -> Tensor:
    """Posterior means of a sequence of images, (n, channels, height, width), float32."""
    parts = [images[i : i + ENCODED_AT_ONCE] for i in range(0, len(images), ENCODED_AT_ONCE)]
    return torch.cat([model.latents(part, generator=None).float() for part in parts])


def noised(process: Process, x0: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (n, …), t (n,) and what the model was once trained to predict there, for clean latents x0 at random times.

    Noise and times, anywhere in the schedule, are drawn in this order from the CPU `generator`.
    """
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    t = process.sample_t(len(x0), low=0.0, high=1.0, generator=generator)
    return process.noised(x0, eps, t), t, process.target(x0, eps, t)


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}.png"
