"""Rendering attempts by blocks, and reading images back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from duo import parallel, rundir
from duo.errors import UserError
from duo.plugins import Attempt
from duo.rundir import Stage, progress
from duo.stages.session import Session


def render(session: Session, folder: Path, attempts: Sequence[Attempt], seeds: Sequence[int], *, label: str) -> None:
    """Render attempts to `folder/0000.png` …, by blocks; a block whose images are all there is done.

    Of several processes each renders some of the blocks: `parallel.barrier` waits for them all.
    """
    paths = [folder / f"{i:04d}.png" for i in range(len(attempts))]
    with progress(len(attempts), label) as bar:
        for rows in parallel.mine(rundir.blocks(len(attempts), session.recipe.block)):
            if not all(paths[i].exists() for i in rows):
                for i, image in zip(rows, _generate(session, attempts, seeds, rows), strict=True):
                    rundir.write_image(paths[i], image)
            bar.update(rows.stop)


def _generate(
    session: Session, attempts: Sequence[Attempt], seeds: Sequence[int], rows: range
) -> Iterator[Image.Image]:
    """The images of one block; rows whose learned tokens differ cannot share a call."""
    start = rows.start
    while start < rows.stop:
        tokens = attempts[start].tokens
        stop = next((i for i in range(start, rows.stop) if not _same(attempts[i].tokens, tokens)), rows.stop)
        batch = attempts[start:stop]
        yield from session.model.generate(
            [one.prompt for one in batch],
            seeds=seeds[start:stop],
            sampling=session.recipe.sampling,
            negative_prompts=[one.negative_prompt or "" for one in batch],
            tokens=tokens or None,
        )
        start = stop


def _same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[word], b[word]) for word in a)


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError on a broken PNG
        raise UserError(f"{path} cannot be read as an image; put it back, or {rundir.ANEW}") from error


def read_images(folder: Path, n: int) -> list[Image.Image]:
    return [read_image(folder / f"{i:04d}.png") for i in range(n)]


def intact_images(stage: Stage, folder: Path, n: int, wanted: str | None) -> None:
    """Raise `UserError` unless the `n` images in `folder`, of a finished stage, are there and have the digest `wanted`.

    `wanted` is None where no digest was recorded, as by older versions of duo.
    """
    for i in range(n):
        stage.intact(str((folder / f"{i:04d}.png").relative_to(stage.folder)))
    if wanted is not None and images_digest(folder, n) != wanted:
        raise stage.broken(folder, "holds other images than its stage wrote")


def images_digest(folder: Path, n: int) -> str:
    return rundir.digest([rundir.digest(folder / f"{i:04d}.png") for i in range(n)])
