"""LPIPS: Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features", eq. 1, AlexNet, version 0.1.

The five ReLU layers of the published AlexNet, channels brought to length 1, squared differences weighed by the learned
heads, averaged over pixels and summed over layers. AlexNet is built here, so that torchvision is not needed; the heads
are those in torchmetrics' wheel, with whose LPIPS values agree (its ε of 1e-8 under the root, too). Pictures are taken
at the size that they have: no resizing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from duo.errors import Problems, UserError
from duo.published import Published, read_pickle, tensors_digest

BATCH = 16
ALEXNET = Published(what="the AlexNet of LPIPS", files=("alexnet-owt-7be5be79.pth",))
HEADS_SHA256 = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"  # alex.pth, LPIPS version 0.1
WIDTHS = (64, 192, 384, 256, 256)  # of the five layers
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from [−1, 1] to what AlexNet was trained on
EPSILON = 1e-8
SMALLEST = 31  # pixels a side, or a pooling has nothing left


def alexnet_features() -> nn.Sequential:
    """An untrained `features` of torchvision's AlexNet up to its fifth ReLU, under the same names (Krizhevsky 2014)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def learned_distance(features_a: Sequence[Tensor], features_b: Sequence[Tensor], heads: Sequence[Tensor]) -> Tensor:
    """Distances (n,) from the features of two sets of images, a tensor (n, channels, height, width) for each layer.

    `heads` are the weights of each layer's channels, (channels,).
    """
    layers = [
        torch.einsum("nchw,c->nhw", (_unit(a) - _unit(b)).square(), head).mean(dim=(1, 2))
        for a, b, head in zip(features_a, features_b, heads, strict=True)
    ]
    return torch.stack(layers).sum(dim=0)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + EPSILON).sqrt()


class LpipsNetwork(nn.Module):
    """AlexNet's layers and the heads; distances (n,) of pictures (n, 3, height, width) in [−1, 1]."""

    def __init__(self, alexnet: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = alexnet_features()
        self.layers.load_state_dict({name.removeprefix("features."): one for name, one in alexnet.items()})
        for index, width in enumerate(WIDTHS):
            self.register_buffer(f"head{index}", heads[f"lin{index}.model.1.weight"].reshape(width).float())
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).reshape(1, 3, 1, 1))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """What the five ReLUs give."""
        x, found = (pictures - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return found

    def forward(self, ours: Tensor, theirs: Tensor) -> Tensor:
        heads = [self.get_buffer(f"head{index}") for index in range(len(WIDTHS))]
        return learned_distance(self.features(ours), self.features(theirs), heads)


@dataclass(kw_only=True)
class Lpips:
    """1 − LPIPS of each image from its reference: 1 for the same picture. It may fall below 0.

    `alexnet` and `heads` are files, or `hub:owner/name/file`, where AlexNet does not lie where torch keeps downloads
    and the heads are not those of torchmetrics; `device` is as torch names it.
    """

    name: ClassVar[str] = "1 - LPIPS-Alex"
    higher_is_better: ClassVar[bool] = True

    alexnet: str | None = None
    heads: str | None = None
    device: str = "cpu"
    _values: list[float] = field(default_factory=list, init=False, repr=False)

    def check(self) -> None:
        """Raise `UserError` where a network's file is missing; no weights are read."""
        self._find()

    def protocol(self) -> dict[str, Any]:
        """Which networks look, and at what."""
        return {
            "network": "AlexNet with the LPIPS heads of version 0.1",
            "digest": tensors_digest(self._network.state_dict()),
            "resolution": "the pictures' own",
        }

    def _find(self) -> tuple[Path, Path]:
        where, problems = "score.metrics.lpips", Problems()
        alexnet = problems.take(lambda: ALEXNET.find(self.alexnet, field=f"{where}.alexnet"))
        heads = problems.take(
            lambda: _own_heads() if self.heads is None else HEADS.find(self.heads, field=f"{where}.heads")
        )
        problems.tell()
        return alexnet, heads

    @cached_property
    def _network(self) -> LpipsNetwork:
        alexnet, heads = self._find()
        layers = {name: one for name, one in ALEXNET.read(alexnet).items() if name.startswith("features.")}
        read = read_pickle(heads, [HEADS_SHA256], what=HEADS.what) if heads.suffix == ".pth" else HEADS.read(heads)
        try:
            network = LpipsNetwork(layers, read)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{alexnet} or {heads} lacks a layer of LPIPS-Alex ({error!r:.80}); fetch it again"
            ) from None
        return network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, *, images: Sequence[Image], references: Sequence[Image] | None, prompts: Sequence[str]) -> None:
        """Add images beside their references, one each and of the same size; `prompts` is not looked at."""
        if references is None or len(references) != len(images):
            raise ValueError(f"{self.name} needs one reference an image, not {len(references or [])} for {len(images)}")
        for first in range(0, len(images), BATCH):
            ours, theirs = (self._pixels(side[first : first + BATCH]) for side in (images, references))
            self._values += (1 - self._network(ours, theirs)).tolist()

    def compute(self) -> list[float]:
        """One value an image, in the order of the updates."""
        return list(self._values)

    def _pixels(self, images: Sequence[Image]) -> Tensor:
        smallest = min(side for image in images for side in image.size)
        if smallest < SMALLEST:
            raise ValueError(f"{self.name} needs pictures of {SMALLEST} pixels a side at least, not {smallest}")
        arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1


HEADS = Published(what="the heads of LPIPS-Alex", files=("alex.pth",))


def _own_heads() -> Path:
    """The heads in torchmetrics' wheel, which is not imported for them."""
    spec = find_spec("torchmetrics")
    folders = [Path(one) for one in spec.submodule_search_locations or ()] if spec else []
    for folder in folders:
        if (path := folder / "functional" / "image" / "lpips_models" / "alex.pth").is_file():
            return path
    raise UserError(
        f"{HEADS.what} come with torchmetrics, which lacks them; reinstall it, or give score.metrics.lpips.heads"
    )
