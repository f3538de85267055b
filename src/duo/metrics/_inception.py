"""The feature network of FID and KID: the Inception-v3 of the TensorFlow release of 2015, by torch-fidelity.

torch-fidelity resizes as TensorFlow 1 did (bilinear, not antialiased, to 299×299, without cropping) and normalises as
the network was trained, which is what published FIDs have. It needs torchvision, and is imported here alone (extra
`metrics`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from duo.errors import Problems, UserError, first_line
from duo.metrics._sets import Floats, stacked
from duo.published import Published, tensors_digest

BATCH = 32
INCEPTION = Published(
    what="the Inception-v3 of FID",
    files=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
)
HOW = 'run: pip install -e ".[metrics]" in the clone of duo, beside a torchvision for your torch'


@dataclass(kw_only=True)
class InceptionFeatures:
    """Features (n, 2048) of pictures: the last pooling of Inception-v3.

    `inception` is its file, or `hub:owner/name/file`, where it does not lie where torch keeps downloads; `device` is as
    torch names it.
    """

    inception: str | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Raise `UserError` where the network's file or its class is missing; no weights are read."""
        problems = Problems()
        problems.take(self._find)
        problems.take(_network_class)
        problems.tell()

    def _find(self) -> Path:
        return INCEPTION.find(self.inception, field=f"score.metrics.{type(self).__name__.lower()}.inception")

    @property
    def digest(self) -> str:
        """sha256 of the network's tensors."""
        return self._loaded[1]

    def protocol(self) -> dict[str, Any]:
        """What looks at the pictures, and how they are prepared."""
        return {
            "network": "Inception-v3 (TensorFlow 2015-12-05), pool 3, by torch-fidelity",
            "digest": self.digest,
            "resolution": "299×299, resized whole by TensorFlow 1's bilinear",
        }

    @cached_property
    def _loaded(self) -> tuple[nn.Module, str]:
        return _load(self._find(), self.device)

    @torch.no_grad()
    def features(self, images: Sequence[Image]) -> Floats:
        """Features (n, 2048) of pictures of any size."""
        network, parts = self._loaded[0], []
        for size in dict.fromkeys(image.size for image in images):
            rows = [i for i, image in enumerate(images) if image.size == size]
            parts += [(i, one) for i, one in zip(rows, self._of(network, [images[i] for i in rows]), strict=True)]
        return stacked([one[None] for _, one in sorted(parts, key=lambda part: part[0])])

    def _of(self, network: nn.Module, images: Sequence[Image]) -> Tensor:
        """Features of pictures of one size."""
        found = []
        for first in range(0, len(images), BATCH):
            arrays = [np.asarray(image.convert("RGB")) for image in images[first : first + BATCH]]
            batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(self.device)
            found.append(network(batch)[0].cpu())
        return torch.cat(found)


def _network_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises a RuntimeError
        raise UserError(
            f"FID and KID need torch-fidelity, which cannot be imported ({first_line(error)}); {HOW}"
        ) from None
    return FeatureExtractorInceptionV3


@lru_cache(maxsize=1)
def _load(path: Path, device: str) -> tuple[nn.Module, str]:
    """The network with its weights held, and their digest; FID and KID share it."""
    tensors = INCEPTION.read(path)
    # Its class unpickles whatever file it is given (torch-fidelity 0.4); this one holds tensors that were checked.
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    try:
        network = _network_class()("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path} is not {INCEPTION.what}: {first_line(error)}; fetch it again") from error
    return network.to(device).eval().requires_grad_(False), tensors_digest(tensors)
