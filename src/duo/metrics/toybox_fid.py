"""The Fréchet distance of Heusel et al. (2017), "GANs Trained by a Two Time-Scale Update Rule", eq. 6, on drawn scenes.

One departure: the features are those of toybox's attribute classifier. Values compare with each other, at equal n and
references, not with FID.
"""

from __future__ import annotations

from typing import ClassVar

from duo.metrics._sets import Floats, frechet_distance
from duo.metrics._toybox import ToyboxFeatures


class ToyboxFid(ToyboxFeatures):
    """0 for the same distribution of features; it grows as n falls."""

    name: ClassVar[str] = "toybox-FID"
    higher_is_better: ClassVar[bool] = False

    def compute(self, features: Floats, references: Floats) -> float:
        """The distance of two equal numbers of features; a ValueError where they are not."""
        return frechet_distance(features, references)
