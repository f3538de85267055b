"""The judge of the embedded world: a small network per hazard and role, trained on the renderer (`duo toybox train`).

Its third label, *corrupted*, is the hazard drawn wrongly: discoloured, half erased, a ghost or a smear of it. It runs
on the CPU, at about a millisecond an image, so that a verdict does not depend on the device that made the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from PIL.Image import Image
from torch import nn

from duo.errors import UserError, did_you_mean
from duo.plugins import Verdict
from duo.toybox.networks import JUDGES, LABELS, load_network, pixels, weights_digest
from duo.toybox.world import HAZARDS

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Toybox:
    """Judges one hazard. `role` "score" and "curate" are two networks of two architectures and seeds: what selects the
    training pairs must not also grade the result."""

    hazard: str
    role: Literal["score", "curate"] = "score"

    def __post_init__(self) -> None:
        for field, value, known in (("hazard", self.hazard, HAZARDS), ("role", self.role, tuple(JUDGES))):
            if value not in known:
                raise UserError(f"judge toybox: {field} is {value!r}{did_you_mean(value, known)}")

    @property
    def _weights(self) -> str:
        return f"{self.hazard}-{self.role}"

    @property
    def network(self) -> str:
        """What looks: a curator with the same one is no independent witness."""
        return self._weights

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights file."""
        return weights_digest(self._weights)

    @cached_property
    def _network(self) -> nn.Module:
        return load_network(self._weights)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> list[Verdict]:
        """One verdict an image; `scores` are the probabilities of the three labels, which sum to 1."""
        verdicts = []
        for first in range(0, len(images), BATCH):
            logits = self._network(pixels(images[first : first + BATCH]))
            for row in logits.softmax(dim=1).tolist():
                scores = dict(zip(LABELS, row, strict=True))
                verdicts.append(Verdict(label=max(scores, key=scores.__getitem__), scores=scores))
        return verdicts
