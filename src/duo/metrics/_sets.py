"""What FID and KID share, whichever network made the features: torchmetrics' own formulas on rows of features."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from duo.errors import UserError, first_line

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as published
FEWEST = 2  # images, below which there is no covariance

Floats = NDArray[np.float64]


def frechet_distance(features: Floats, references: Floats) -> float:
    """FID (Heusel et al. 2017, eq. 6) of two equal numbers of features, (n, width) each, by torchmetrics, in float64.

    Both are first turned into the space that their rows span, which changes nothing but the time where images are fewer
    than features. Raises ValueError where the numbers differ, or are below 2.
    """
    ours, theirs = _spanned(*_checked(features, references))
    metric = _torchmetrics("fid").FrechetInceptionDistance(feature=_Given(ours.shape[1]))
    metric.update(theirs, real=True)
    metric.update(ours, real=False)
    return float(metric.compute())


def kernel_distance(features: Floats, references: Floats, *, seed: int = 0) -> float:
    """KID (Bińkowski et al. 2018, section 3) of two equal numbers of features, by torchmetrics' unbiased estimate.

    The published protocol is kept: the mean over 100 subsets of 1000, drawn by `seed`; of 1000 images or fewer it is
    one estimate from all. Below 0 is chance, or that images and references share captions, which makes them alike in
    pairs. Raises ValueError as `frechet_distance`.
    """
    poly_mmd = _torchmetrics("kid").poly_mmd
    ours, theirs = _checked(features, references)
    n = len(ours)
    if n <= SUBSET_SIZE:
        return float(poly_mmd(theirs, ours))
    rng = np.random.default_rng(seed)
    drawn = [[rng.choice(n, SUBSET_SIZE, replace=False) for _ in range(2)] for _ in range(SUBSETS)]
    return float(np.mean([float(poly_mmd(theirs[one], ours[other])) for one, other in drawn]))


def _torchmetrics(name: str) -> Any:
    """A module of torchmetrics' image metrics, whose import fails where torch-fidelity lacks its torchvision."""
    try:
        return import_module(f"torchmetrics.image.{name}")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torchmetrics cannot be imported ({first_line(error)}); give torch-fidelity a torchvision for your torch, "
            "or uninstall it"
        ) from error


class _Given(nn.Module):
    """Features that were made already, in a feature network's place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _checked(features: Floats, references: Floats) -> tuple[Tensor, Tensor]:
    if features.shape != references.shape:
        raise ValueError(
            f"{len(features)} images beside {len(references)} references: distances of sets depend on their size, so "
            "both must be as many"
        )
    if len(features) < FEWEST:
        raise ValueError(f"{len(features)} images are no set; give at least {FEWEST}")
    ours, theirs = (torch.from_numpy(np.ascontiguousarray(one, dtype=np.float64)) for one in (features, references))
    return ours, theirs


def _spanned(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both in coordinates of the space that their rows span: a rotation, which keeps means' and covariances' sizes."""
    rows = torch.cat([ours, theirs])
    if len(rows) >= rows.shape[1]:
        return ours, theirs
    axes = torch.linalg.qr(rows.T).Q
    return ours @ axes, theirs @ axes


def stacked(parts: Sequence[Tensor]) -> Floats:
    """Features of several batches as one array (n, width)."""
    return torch.cat(list(parts)).double().cpu().numpy()
