"""CLIP score: Hessel et al. (2021), "CLIPScore", eq. 1, on the scale of torchmetrics and of papers: 100 · max(cos, 0).

By `duo.clip` rather than torchmetrics, whose 1.9 breaks on transformers 5 and takes no local folder. Scores of two
CLIPs do not compare: papers have ViT-B/32, B/16 or L/14, and few say which. Here it is L/14 unless another is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duo.metrics._clip_score import ClipScores


@dataclass(kw_only=True)
class ClipScore(ClipScores):
    """How well each picture goes with its prompt, 0 to 100."""

    name: ClassVar[str] = "CLIP score"

    model: str = "openai/clip-vit-large-patch14"
