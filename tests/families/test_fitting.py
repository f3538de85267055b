from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from duo.families import _diffusers
from duo.families._fitting import Fitting
from duo.plugins import Sampling

SHORT = Sampling(num_inference_steps=2, guidance_scale=3.0)
PROMPTS = ["a red house", "a blue boat", "a car", "the beach", "fire"]


class Card:
    """Draws rows as numbers, and has room for so many at once."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def __call__(self, rows: slice) -> list[Any]:
        numbers = list(range(rows.start, rows.stop))
        self.asked.append(len(numbers))
        if len(numbers) > self.room:
            raise torch.OutOfMemoryError("too much")
        return numbers


def test_a_batch_that_does_not_fit_is_halved_and_what_fits_is_remembered() -> None:
    fitting, card = Fitting(), Card(room=3)
    assert fitting.drawn(card, 10, kind="small") == list(range(10))
    assert card.asked == [10, 5, 2, 2, 2, 2, 2]
    card.asked.clear()
    assert fitting.drawn(card, 3, kind="small") == [0, 1, 2]
    assert card.asked == [2, 1]
    assert fitting.drawn(card, 3, kind="other") == [0, 1, 2]
    assert card.asked == [2, 1, 3]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        Fitting().drawn(Card(room=0), 4, kind="any")


def test_other_errors_are_not_tried_again() -> None:
    def broken(rows: slice) -> list[Any]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Fitting().drawn(broken, 4, kind="any")


def test_what_is_drawn_in_parts_is_what_is_drawn_together(tiny_sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.new("RGB", (64, 64), (40 * i, 90, 200)) for i in range(5)]
    masks = [Image.new("L", (64, 64), 255 * (i % 2)) for i in range(5)]
    latents = torch.randn(5, *tiny_sd.latent_shape, generator=torch.Generator().manual_seed(0))

    def drawn() -> list[np.ndarray]:
        seeds, negatives = range(5), PROMPTS[::-1]
        ways = (
            tiny_sd.generate(PROMPTS, seeds=seeds, sampling=SHORT, negative_prompts=negatives, latents=latents),
            tiny_sd.edit(images, PROMPTS, strength=0.8, seeds=seeds, sampling=SHORT),
            tiny_sd.edit(images, PROMPTS, strength=0.8, seeds=seeds, sampling=SHORT, masks=masks),
        )
        return [np.stack([np.asarray(image, dtype=np.int16) for image in one]) for one in ways]

    whole = drawn()
    sample, sizes = _diffusers.sample, list[int]()

    def little_room(pipeline: Any, *, seeds: Any, **given: Any) -> Any:
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("too much")
        sizes.append(len(seeds))
        return sample(pipeline, seeds=seeds, **given)

    monkeypatch.setattr(_diffusers, "sample", little_room)
    for one, other in zip(whole, drawn(), strict=True):
        assert np.abs(one - other).max() <= 1
    assert sizes == [2, 2, 1] * 3
