"""Perceptual distance of Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features", eq. 1.

Two departures, for want of human judgements of drawn scenes: the feature network is toybox's own attribute classifier,
and its channels and layers weigh alike, where LPIPS has learned weights. Values compare with each other, not with those
of LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from duo.toybox.networks import load_network, pixels

BATCH = 64


def perceptual_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
    """Distances (n,) from the features of two sets of images, a tensor (n, channels, height, width) for each layer.

    Every pixel's channels are brought to length 1; squared differences are summed over channels and averaged over
    pixels, then over layers. 0 for the same features; at most 2 for features that are never negative.
    """
    layers = [
        (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square().sum(dim=1).mean(dim=(1, 2))
        for a, b in zip(features_a, features_b, strict=True)
    ]
    return torch.stack(layers).mean(dim=0)


class ToyboxLpips:
    """1 − `perceptual_distance` of each image from its reference: 1 for the same picture."""

    name: ClassVar[str] = "1 - toybox-LPIPS"
    higher_is_better: ClassVar[bool] = True

    def __init__(self) -> None:
        self._values: list[float] = []

    @cached_property
    def _network(self) -> nn.Module:
        return load_network("attributes")

    @torch.no_grad()
    def update(self, *, images: Sequence[Image], references: Sequence[Image] | None, prompts: Sequence[str]) -> None:
        """Add images beside their references, one each; `prompts` is not looked at."""
        if references is None or len(references) != len(images):
            raise ValueError(f"{self.name} needs one reference an image, not {len(references or [])} for {len(images)}")
        for first in range(0, len(images), BATCH):
            ours, theirs = (
                self._network.features(pixels(side[first : first + BATCH]))  # type: ignore[operator]
                for side in (images, references)
            )
            self._values += (1 - perceptual_distance(ours, theirs)).tolist()

    def compute(self) -> list[float]:
        """One value an image, in the order of the updates."""
        return list(self._values)
