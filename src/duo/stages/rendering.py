"""Rendering attempts by blocks, and reading images back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from PIL import Image

from duo import parallel, rundir
from duo.delta import Delta
from duo.errors import UserError
from duo.plugins import Attempt, Family, Sampling
from duo.rundir import progress
from duo.stages.session import Session

READ_TOGETHER = 64  # images: of tens of thousands, not all are held at once


def render(
    session: Session,
    folder: Path,
    attempts: Sequence[Attempt],
    seeds: Sequence[int],
    *,
    label: str,
    model: str,
    weights: Path | None = None,
) -> None:
    """Render attempts to `folder/0000.png` …, by blocks; a block whose images are all there is done.

    It is called within `session.as_model(model)`. `weights` is the folder of the deltas that attempts name. Of several
    processes each renders some of the blocks: `parallel.barrier` waits for them all.
    """
    for prompt in dict.fromkeys(one.prompt for one in attempts):
        if found := session.refused(prompt):
            raise UserError(f"{label}: the prompt {prompt!r} is refused, as it mentions a minor ({found}); take it out")
    paths = [folder / f"{i:04d}.png" for i in range(len(attempts))]
    with progress(len(attempts), label) as bar:
        for rows in parallel.mine(rundir.blocks(len(attempts), session.recipe.block)):
            if not all(paths[i].exists() for i in rows):
                images = _draw(session, model, weights, [attempts[i] for i in rows], [seeds[i] for i in rows])
                for i, image in zip(rows, images, strict=True):
                    rundir.write_image(paths[i], image)
            bar.update(rows.stop)


def _draw(
    session: Session, name: str, weights: Path | None, attempts: Sequence[Attempt], seeds: Sequence[int]
) -> Iterator[Image.Image]:
    """The images of one block, of which those that share one call of the model lie side by side."""
    start = 0
    while start < len(attempts):
        first = attempts[start]
        stop = next((i for i in range(start, len(attempts)) if not _alike(attempts[i], first)), len(attempts))
        with _as_published(session, name, first, weights) as model:
            yield from _generate(model, attempts[start:stop], seeds[start:stop], session.recipe.sampling)
        start = stop


@contextmanager
def _as_published(session: Session, name: str, one: Attempt, weights: Path | None) -> Iterator[Family]:
    """The model that draws an attempt: its adapter dropped, or other weights over it, where the attempt says so."""
    with session.unloaded(name) if one.unloaded else session.at_hand(name) as model, ExitStack() as held:
        if one.weights is not None:
            assert weights is not None
            held.enter_context(Delta.load(weights / f"{one.weights}.safetensors").attached(model))
        yield model


def _generate(
    model: Family, batch: Sequence[Attempt], seeds: Sequence[int], sampling: Sampling
) -> Sequence[Image.Image]:
    """Attempts that are `_alike`, in one call."""
    prompts, first = [one.prompt for one in batch], batch[0]
    # None is what guidance starts from where nothing is said, which need not be the empty prompt (SDXL: zeros).
    negatives = None if first.negative_prompt is None else [one.negative_prompt or "" for one in batch]
    if first.init is None:
        noise = (
            None if first.latents is None else torch.stack([one.latents for one in batch if one.latents is not None])
        )
        return model.generate(
            prompts,
            seeds=seeds,
            sampling=sampling,
            negative_prompts=negatives,
            tokens=first.tokens or None,
            **({} if noise is None else {"latents": noise}),
        )
    assert first.strength is not None
    return model.edit(
        [one.init for one in batch if one.init is not None],
        prompts,
        strength=first.strength,
        seeds=seeds,
        sampling=sampling,
        negative_prompts=negatives,
        tokens=first.tokens or None,
        masks=None if first.mask is None else [one.mask for one in batch if one.mask is not None],
    )


def _alike(a: Attempt, b: Attempt) -> bool:
    """Whether one call of the model can draw both."""
    return _call(a) == _call(b) and _same(a.tokens, b.tokens)


def _call(one: Attempt) -> tuple[object, ...]:
    size = None if one.init is None else one.init.size
    kinds = one.mask is None, one.latents is None, one.negative_prompt is None
    return one.weights, one.unloaded, one.strength, size, *kinds


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[word], b[word]) for word in a)


def read_image(path: Path) -> Image.Image:
    return rundir.read_image(path, remedy=f"put it back, or {rundir.ANEW}")


def read_images(folder: Path, n: int) -> list[Image.Image]:
    return [read_image(folder / f"{i:04d}.png") for i in range(n)]
