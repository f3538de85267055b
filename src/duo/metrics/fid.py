"""FID: Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule", eq. 6, by torchmetrics.

It is biased upward, the more the fewer the images, so that numbers compare only at equal n and with the same references
(Chong and Forsyth 2020): another number of references than of images is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duo.metrics._inception import InceptionFeatures
from duo.metrics._sets import Floats, frechet_distance


@dataclass(kw_only=True)
class Fid(InceptionFeatures):
    """0 for the same distribution of Inception features."""

    name: ClassVar[str] = "FID"
    higher_is_better: ClassVar[bool] = False

    def compute(self, features: Floats, references: Floats) -> float:
        """The distance of two equal numbers of features; a ValueError where they are not."""
        return frechet_distance(features, references)
