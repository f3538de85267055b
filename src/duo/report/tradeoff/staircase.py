"""What a set of trade-off points attains: the Pareto front, and the area under the staircase.

Points are (preservation, defence success); of both more is better. Pure functions over arrays, of which
further axes may hold resamples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def on_front(x: Floats, y: Floats) -> NDArray[np.bool_]:
    """Of each point, (points, …), whether no other is as good in both and better in one. Equal points are all on it.

    >>> on_front(np.array([0.9, 0.8, 0.8]), np.array([0.5, 0.7, 0.5])).tolist()
    [True, True, False]
    """
    as_good = (x[None] >= x[:, None]) & (y[None] >= y[:, None])  # [i, j]: j is as good as i in both
    better = as_good & ((x[None] > x[:, None]) | (y[None] > y[:, None]))
    return np.logical_not(better.any(axis=1))


def area(x: Floats, y: Floats, *, low: float, high: float) -> Floats:
    """The area under what the points attain between the preservations `low` and `high`, divided by their distance.

    Attained at a preservation p is the highest y of all points with x ≥ p, and 0 where there is none: a step function,
    without interpolation, since nothing says that a method has the points between those that were tried. So it is 1
    only of a point with x ≥ `high` and y = 1, more points never lower it, and a curve that was tried at few strengths
    has less of it. (points, …) → (…).

    >>> float(area(np.array([0.9, 0.85]), np.array([0.5, 1.0]), low=0.8, high=1.0).round(9))
    0.375
    """
    if not low < high:
        raise ValueError(f"an area needs low < high, not {low} and {high}")
    order = np.argsort(x, axis=0)
    x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    best = np.maximum.accumulate(y[::-1], axis=0)[::-1]  # of this point and all that keep more
    ends = np.clip(x, low, high)
    starts = np.concatenate([np.full_like(ends[:1], low), ends[:-1]])
    return np.asarray((best * (ends - starts)).sum(axis=0) / (high - low))
