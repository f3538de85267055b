"""How many images fit a GPU's memory at once: found by trying, for it depends on model, size, card and neighbours.

A batch that does not fit is drawn in halves, and what fitted is what later batches begin with. On a CPU nothing is ever
halved, so that what is drawn there does not depend on the machine; on a GPU it may differ by round-off.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from PIL.Image import Image


class Fitting:
    """What was found to fit, by kind of batch (pipeline and size of images)."""

    def __init__(self) -> None:
        self._most: dict[Hashable, int] = {}

    def drawn(self, draw: Callable[[slice], list[Image]], rows: int, *, kind: Hashable) -> list[Image]:
        """The images of so many rows, by as few calls of `draw` as fit; where not even one does, the error of that."""
        images: list[Image] = []
        while len(images) < rows:
            start = len(images)
            n = min(self._most.get(kind, rows), rows - start)
            part = _tried(draw, slice(start, start + n), last=n == 1)
            if part is None:
                self._most[kind] = n // 2
                torch.cuda.empty_cache()  # which the failed call has filled with pieces of its own sizes
            else:
                images += part
        return images


def _tried(draw: Callable[[slice], list[Image]], rows: slice, *, last: bool) -> list[Image] | None:
    """Images, or None where they do not fit: by a return, for a caught error would hold on to the tensors."""
    try:
        return draw(rows)
    except torch.OutOfMemoryError:
        if last:
            raise
        return None
