"""FID and KID on given features: closed forms, torchmetrics' own classes, and toybox's counterparts on pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

from duo.metrics._sets import SUBSET_SIZE, frechet_distance, kernel_distance
from duo.metrics.toybox_fid import ToyboxFid
from duo.metrics.toybox_kid import ToyboxKid
from duo.toybox.train_judges import natural_pictures


def exactly(n: int, mean: list[float], spread: list[float], *, seed: int) -> np.ndarray:
    """n rows whose sample mean is `mean` and whose sample covariance is diag(spread²), not only in expectation."""
    rows = np.random.default_rng(seed).normal(size=(n, len(mean)))
    rows -= rows.mean(axis=0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return rows * spread + mean


@pytest.mark.parametrize("n", [50, 400])
def test_fid_of_two_gaussians_has_its_closed_form(n: int) -> None:
    """|m₁ − m₂|² + Σ (s₁ − s₂)² for covariances that share their axes: 3² + 4² and 1² + 0² + 2²."""
    ours = exactly(n, [3.0, 0.0, 1.0], [2.0, 1.0, 3.0], seed=1)
    theirs = exactly(n, [0.0, 4.0, 1.0], [1.0, 1.0, 1.0], seed=2)
    assert frechet_distance(ours, theirs) == pytest.approx(9 + 16 + 1 + 0 + 4, rel=1e-9)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-6)


class _AsGiven(nn.Module):
    num_features = 24

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
@pytest.mark.parametrize("n", [8, 100])  # fewer images than features, where they are turned into their span, and more
def test_they_agree_with_torchmetrics_on_the_same_features(n: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.3, 1.2, (n, 24)), rng.normal(size=(n, 24)) @ rng.normal(size=(24, 24)) / 5
    fid, kid = FrechetInceptionDistance(_AsGiven()), KernelInceptionDistance(_AsGiven(), subsets=1, subset_size=n)
    for metric in (fid, kid):
        metric.update(torch.from_numpy(theirs), real=True)
        metric.update(torch.from_numpy(ours), real=False)
    assert frechet_distance(ours, theirs) == pytest.approx(float(fid.compute()), rel=1e-5)
    assert kernel_distance(ours, theirs) == pytest.approx(float(kid.compute()[0]), rel=1e-9)


def test_kid_by_hand() -> None:
    """Two images of one feature each, k(a, b) = (ab + 1)³: ours 0 and 1, theirs 1 and 2.

    Within ours k(0, 1) = 1, within theirs k(1, 2) = 27; across k = 1, 1, 8, 27, of mean 37/4. So 1 + 27 − 2·37/4.
    """
    ours, theirs = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    assert kernel_distance(ours, theirs) == pytest.approx(28 - 37 / 2)


def test_kid_of_many_images_is_a_mean_over_subsets_that_a_seed_fixes() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = (rng.normal(size=(SUBSET_SIZE + 50, 2)) for _ in range(2))
    state = torch.get_rng_state()
    first = kernel_distance(ours, theirs)
    assert kernel_distance(ours, theirs) == first != kernel_distance(ours, theirs, seed=1)
    assert first == pytest.approx(0, abs=0.05)
    assert torch.equal(torch.get_rng_state(), state), "no other draw may depend on it"


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_unequal_numbers_are_refused(distance: object) -> None:
    rows = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"4 images beside 5 references: .* both must be as many"):
        distance(rows[:4], rows)  # type: ignore[operator]
    with pytest.raises(ValueError, match="1 images are no set"):
        distance(rows[:1], rows[:1])  # type: ignore[operator]


@pytest.mark.parametrize("leaf", [ToyboxFid, ToyboxKid])
def test_toyboxs_counterparts_tell_worse_pictures(leaf: type) -> None:
    images = [Image.fromarray(picture) for _, picture in natural_pictures(120, seed=2)]
    metric = leaf()
    first, second = metric.features(images[:60]), metric.features(images[60:])
    blurred = metric.features([image.filter(ImageFilter.GaussianBlur(5)) for image in images[:60]])
    assert first.shape == (60, 256)
    same, worse = metric.compute(first, second), metric.compute(blurred, second)
    assert metric.name.startswith("toybox-") and not metric.higher_is_better
    assert worse > 1.5 * abs(same)
    assert set(metric.protocol()) == {"network", "digest", "resolution"}


def test_features_of_an_image_do_not_depend_on_the_others() -> None:
    images = [Image.fromarray(picture) for _, picture in natural_pictures(70, seed=3)]
    together, alone = ToyboxFid().features(images), ToyboxFid().features(images[66:67])
    assert together[66] == pytest.approx(alone[0], abs=1e-4)
