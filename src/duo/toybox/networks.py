"""The small convolutional networks that look at toybox pictures: two kinds of judge, and the attribute classifier.

All take pictures (n, 3, 64, 64) in [−1, 1]. Their weights ship as fp16 and are used as fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from duo import toybox
from duo.checkpoint import read_tensors
from duo.errors import UserError
from duo.toybox.world import COLOURS, EXTRAS, PLACES, SIZE, SUBJECTS

LABELS = ("absent", "present", "corrupted")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "colour": tuple(COLOURS),
    "place": PLACES,
    "extra": ("none", *EXTRAS),
}
WEIGHTS = toybox.WEIGHTS / "judges"


def pixels(images: Sequence[Image]) -> Tensor:
    """Pictures of any size as (n, 3, 64, 64) in [−1, 1]; others than 64×64 are resized by Lanczos."""
    if not images:
        return torch.empty(0, 3, SIZE, SIZE)
    fitting = (image.convert("RGB") for image in images)
    fitting = (i if i.size == (SIZE, SIZE) else i.resize((SIZE, SIZE), Resampling.LANCZOS) for i in fitting)
    return as_pixels(np.stack([np.asarray(i) for i in fitting]))


def as_pixels(pictures: np.ndarray) -> Tensor:
    """(n, 64, 64, 3) uint8 → (n, 3, 64, 64) in [−1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _conv(inputs: int, outputs: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _pooled(x: Tensor) -> Tensor:
    """(n, c, h, w) → (n, 2c): means tell of the scene, maxima of what is small and local (a spark, a stroke)."""
    return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)


class _PlainTrunk(nn.ModuleList):
    """Convolution, batch norm and ReLU, four to five times; returns what every stage saw."""

    def __init__(self, widths: Sequence[int]) -> None:
        first, *rest = widths
        stages = [_conv(3, first, size=5, stride=2)]
        for index, (inputs, outputs) in enumerate(zip(widths, rest, strict=False)):
            stages.append(_conv(inputs, outputs, stride=2 if index < 2 else 1))
        super().__init__(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self:
            x = stage(x)
            features.append(x)
        return features


class PlainJudge(nn.Module):
    """The judge that scores: a plain stack of convolutions. Returns logits (n, 3) over `LABELS`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _PlainTrunk((24, 48, 96, 128))
        self.head = nn.Linear(2 * 128, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_pooled(self.trunk(x)[-1]))


class _Residual(nn.Module):
    """Two convolutions beside an identity, with group norm, which (unlike batch norm) judges each picture alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualJudge(nn.Module):
    """The judge that curates: residual blocks on 2×2-pixel patches. Returns logits (n, 3) over `LABELS`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 32, 4, stride=2, padding=1),
            _Residual(32),
            nn.Conv2d(32, 80, 4, stride=2, padding=1),
            _Residual(80),
            nn.GroupNorm(8, 80),
            nn.SiLU(),
        )
        self.head = nn.Linear(2 * 80, len(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_pooled(self.body(x)))


class AttributeNet(nn.Module):
    """Tells subject, colour, place and extra; its stages double as the feature network of `toybox-LPIPS`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _PlainTrunk((24, 48, 96, 128, 128))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * 128, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, x: Tensor) -> list[Tensor]:
        """What the five stages saw: 32², 16² and three times 8² pixels."""
        return self.trunk(x)

    def pooled(self, x: Tensor) -> Tensor:
        """The last stage's means and maxima, (n, 256): what the heads read."""
        return _pooled(self.trunk(x)[-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (n, values) for each attribute of `ATTRIBUTES`."""
        pooled = self.pooled(x)
        return {name: head(pooled) for name, head in self.heads.items()}


JUDGES: dict[str, type[nn.Module]] = {"score": PlainJudge, "curate": ResidualJudge}


def new_network(name: str) -> nn.Module:
    """An untrained network by the name of its weights: "attributes", or hazard and role ("fire-score")."""
    return AttributeNet() if name == "attributes" else JUDGES[name.rpartition("-")[2]]()


def weights_digest(name: str) -> str:
    """sha256 of a network's weights file, in hexadecimal."""
    return hashlib.sha256(_weights(name).read_bytes()).hexdigest()


def load_network(name: str) -> nn.Module:
    """A trained network in fp32, in evaluation mode, with its weights held."""
    tensors, _ = read_tensors(_weights(name))
    network = new_network(name)
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return network.eval().requires_grad_(False)


def _weights(name: str) -> Path:
    path = WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise UserError(f"{path} is missing: reinstall duo, or make it with `duo toybox train`")
    return path
