from __future__ import annotations

import numpy as np
import pytest

from duo.report.tradeoff.staircase import area, on_front


def of(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = zip(*points, strict=True)
    return np.array(x), np.array(y)


def test_the_front_by_hand() -> None:
    """The third keeps as much as the first and defends less; the fourth defends as the second and keeps less."""
    points = of((0.9, 0.5), (0.8, 0.7), (0.9, 0.4), (0.7, 0.7), (0.6, 0.6), (0.5, 0.9))
    assert on_front(*points).tolist() == [True, True, False, False, False, True]


def test_equal_points_are_on_the_front_together() -> None:
    assert on_front(*of((0.9, 0.5), (0.9, 0.5), (0.8, 0.5))).tolist() == [True, True, False]


def test_area_by_hand() -> None:
    """From 0.8: 0.9 up to 0.85, then 0.6 up to 0.95, then nothing; the point that is worse in both adds nothing."""
    wanted = (0.05 * 0.9 + 0.10 * 0.6) / 0.2
    points = [(0.95, 0.6), (0.85, 0.9), (0.84, 0.5)]
    for order in (points, points[::-1]):
        assert area(*of(*order), low=0.8, high=1.0) == pytest.approx(wanted)


def test_a_weaker_point_that_keeps_more_does_not_hide_a_better_one_and_the_reverse() -> None:
    """A point that keeps more and defends more is attained by those who ask for less, too."""
    assert area(*of((0.9, 0.2), (0.95, 0.8)), low=0.8, high=1.0) == pytest.approx(0.15 * 0.8 / 0.2)


def test_points_outside_of_the_interval() -> None:
    assert area(*of((0.5, 1.0)), low=0.8, high=1.0) == 0
    assert area(*of((1.2, 0.7)), low=0.8, high=1.0) == pytest.approx(0.7)
    assert area(*of((1.0, 1.0)), low=0.8, high=1.0) == pytest.approx(1.0)


def test_resamples_are_worked_one_by_one() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.7, 1, size=(5, 20)), rng.uniform(size=(5, 20))
    wanted = [float(area(x[:, i], y[:, i], low=0.8, high=1.0)) for i in range(20)]
    assert area(x, y, low=0.8, high=1.0) == pytest.approx(wanted)
    assert on_front(x, y)[:, 3].tolist() == on_front(x[:, 3], y[:, 3]).tolist()


def test_an_area_needs_an_interval() -> None:
    with pytest.raises(ValueError, match="low < high"):
        area(*of((0.9, 0.5)), low=1.0, high=0.8)
