"""The CLIP score of Hessel et al. (2021), eq. 1, by the CLIP of the embedded world: 100 · max(cos, 0).

That CLIP knows drawn scenes alone; values compare with each other, not with CLIP scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duo.clip import EMBEDDED
from duo.metrics._clip_score import ClipScores


@dataclass(kw_only=True)
class ToyboxClipScore(ClipScores):
    """How well each picture goes with its prompt, 0 to 100."""

    name: ClassVar[str] = "toybox-CLIP score"

    model: str = EMBEDDED
