"""A judge for models with random weights, as somebody else's package brings one: by an entry point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import numpy as np
from PIL.Image import Image

from duo.plugins import Verdict


@dataclass(frozen=True, kw_only=True)
class Coin:
    """Present in a share of pictures that the last digits of their pixels' sum decide: both labels come about soon."""

    present: float = 0.5

    @property
    def digest(self) -> str:
        return f"coin {self.present}"

    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        ranks = [int(np.asarray(image).astype(np.int64).sum()) % 97 / 97 for image in images]
        return [Verdict(label="present" if rank < self.present else "absent", scores={"rank": rank}) for rank in ranks]


def entry_points(*, group: str) -> list[EntryPoint]:
    """What `importlib.metadata.entry_points` would find were this file installed as a package."""
    return [EntryPoint("coin", "tiny_judge:Coin", group)] if group == "duo.judges" else []
