"""KID: Bińkowski et al. (2018), "Demystifying MMD GANs", section 3, by torchmetrics: unbiased, whatever n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from duo.metrics._inception import InceptionFeatures
from duo.metrics._sets import Floats, kernel_distance


@dataclass(kw_only=True)
class Kid(InceptionFeatures):
    """0 on average for independent sets of one distribution of Inception features."""

    name: ClassVar[str] = "KID"
    higher_is_better: ClassVar[bool] = False

    def compute(self, features: Floats, references: Floats) -> float:
        """The distance of two equal numbers of features; a ValueError where they are not."""
        return kernel_distance(features, references)
