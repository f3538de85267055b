"""The feature network of the embedded world's set metrics: toybox's attribute classifier, pooled.

It stands where Inception does in FID and KID. It was trained on drawn scenes, so its numbers say nothing of
photographs, and none of them is the FID or KID that papers print: names begin with "toybox-".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from duo.metrics._sets import Floats, stacked
from duo.toybox.networks import load_network, pixels, weights_digest

BATCH = 64
NETWORK = "attributes"
RESOLUTION = "64×64, resized by Lanczos where it is another"


class ToyboxFeatures:
    """Features (n, 256) of pictures: means and maxima over the last stage's channels."""

    @property
    def digest(self) -> str:
        """sha256 of the network's weights file."""
        return weights_digest(NETWORK)

    def protocol(self) -> dict[str, Any]:
        """What looks at the pictures, and how they are prepared."""
        return {"network": "toybox attribute classifier, last stage", "digest": self.digest, "resolution": RESOLUTION}

    @cached_property
    def _network(self) -> nn.Module:
        return load_network(NETWORK)

    @torch.no_grad()
    def features(self, images: Sequence[Image]) -> Floats:
        """Features (n, 256) of pictures of any size."""
        batches = [pixels(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
        return stacked([self._network.pooled(batch) for batch in batches])  # type: ignore[operator]
