from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from duo.metrics.toybox_lpips import ToyboxLpips, perceptual_distance
from duo.toybox.train_judges import natural_pictures


def test_by_hand() -> None:
    # One image, two layers. The first has 1×2 pixels of two channels: (3, 4) beside (6, 8), the same direction, and
    # (1, 0) beside (0, 5), 1² + 1² = 2 apart: mean 1. The second has one pixel: (2, 0) beside (3, 4), that is (1, 0)
    # beside (0.6, 0.8): 0.4² + 0.8² = 0.8.
    a = [torch.tensor([[[[3.0, 1.0]], [[4.0, 0.0]]]]), torch.tensor([[[[2.0]], [[0.0]]]])]
    b = [torch.tensor([[[[6.0, 0.0]], [[8.0, 5.0]]]]), torch.tensor([[[[3.0]], [[4.0]]]])]
    assert perceptual_distance(a, b).tolist() == pytest.approx([(1 + 0.8) / 2])


def test_silent_pixels_count_as_equal_to_each_other() -> None:
    silent = [torch.zeros(1, 3, 2, 2)]
    assert perceptual_distance(silent, silent).tolist() == [0]


def test_identical_images_score_one_and_worse_copies_less() -> None:
    images = [Image.fromarray(picture) for _, picture in natural_pictures(70, seed=1)]
    soft = [image.filter(ImageFilter.GaussianBlur(1)) for image in images]
    metric = ToyboxLpips()
    for references in (images, soft, images[1:] + images[:1]):
        metric.update(images=images, references=references, prompts=[""] * 70)
    same, blurred, other = np.array(metric.compute()).reshape(3, 70)
    assert same == pytest.approx(1, abs=1e-6)
    assert (blurred < 1).all() and blurred.mean() > other.mean() + 0.1


def test_references_are_required() -> None:
    with pytest.raises(ValueError, match="one reference an image"):
        ToyboxLpips().update(images=[Image.new("RGB", (64, 64))], references=None, prompts=[""])
