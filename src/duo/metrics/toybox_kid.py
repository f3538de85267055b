"""The kernel distance of Bińkowski et al. (2018), "Demystifying MMD GANs", section 3, on drawn scenes.

One departure: the features are those of toybox's attribute classifier. Values compare with each other, not with KID.
"""

from __future__ import annotations

from typing import ClassVar

from duo.metrics._sets import Floats, kernel_distance
from duo.metrics._toybox import ToyboxFeatures


class ToyboxKid(ToyboxFeatures):
    """0 on average for independent sets of one distribution of features, whatever n."""

    name: ClassVar[str] = "toybox-KID"
    higher_is_better: ClassVar[bool] = False

    def compute(self, features: Floats, references: Floats) -> float:
        """The distance of two equal numbers of features; a ValueError where they are not."""
        return kernel_distance(features, references)
