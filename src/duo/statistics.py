"""Confidence intervals for rates and means. Every random interval is fixed by its `seed`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1_000_000  # drawn indices held at once

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """The ends of a two-sided confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Score interval for a rate of `successes` in `n` independent trials (Wilson 1927).

    Not degenerate at 0 or n successes, unlike the textbook interval (Newcombe 1998). Raises ValueError for n < 1.

    >>> low, high = wilson(81, 263)
    >>> round(low, 4), round(high, 4)
    (0.2553, 0.3662)
    """
    _check_confidence(confidence)
    if n < 1:
        raise ValueError("a rate needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / n
    centre = rate + z**2 / (2 * n)
    margin = z * (rate * (1 - rate) / n + z**2 / (4 * n**2)) ** 0.5
    scale = 1 + z**2 / n
    # At the ends one limit is the rate itself; rounding must not move it out of [0, 1].
    low = 0.0 if successes == 0 else (centre - margin) / scale
    high = 1.0 if successes == n else (centre + margin) / scale
    return Interval(low, high)


def images_for_bound(rate: float, limit: float, *, confidence: float = 0.95) -> int:
    """The fewest independent images at which Wilson's upper limit of a `rate` is not above `limit` (Wilson 1927).

    Solved for n: (rate − limit)² = z²·limit·(1 − limit)/n. Raises ValueError unless 0 ≤ rate < limit ≤ 1.

    >>> images_for_bound(0, 0.05), round(wilson(0, 73).high, 4), round(wilson(0, 72).high, 4)
    (73, 0.05, 0.0507)
    """
    _check_confidence(confidence)
    if not 0 <= rate < limit <= 1 or (limit - rate) ** 2 == 0:
        raise ValueError(f"a rate of {rate} cannot be shown to be at most {limit}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return max(1, math.ceil(z**2 * limit * (1 - limit) / (limit - rate) ** 2))


def bootstrap_mean(
    values: Sequence[float], *, seed: int, confidence: float = 0.95, resamples: int = 10_000
) -> Interval:
    """Percentile bootstrap of the mean of independent `values` (Efron 1979; Efron and Tibshirani 1993, section 13.3).

    Equal values give an interval of no width, and few values one that is too narrow. Raises ValueError for no values.
    """
    return _bootstrap(_finite(values), np.ones(len(values)), seed=seed, confidence=confidence, resamples=resamples)


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap of the mean that draws whole clusters (Davison and Hinkley 1997, section 3.8).

    For several images of one prompt, which are not independent: `clusters` names each value's prompt. Clusters may
    differ in size; the mean is over values. Raises ValueError where there are no values, or not one cluster a value.
    """
    numbers = _finite(values)
    if len(clusters) != len(numbers):
        raise ValueError(f"{len(numbers)} values but {len(clusters)} clusters")
    member_of = _numbered(clusters)
    sums, sizes = (np.zeros(member_of.max() + 1) for _ in range(2))
    np.add.at(sums, member_of, numbers)
    np.add.at(sizes, member_of, 1)
    return _bootstrap(sums, sizes, seed=seed, confidence=confidence, resamples=resamples)


def crossed_bootstrap(
    values: Sequence[float],
    rows: Sequence[Hashable],
    columns: Sequence[Hashable],
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile interval of the mean where two things vary at random: the pigeonhole bootstrap (Owen 2007).

    For images of several prompts by tokens that were learned from several starts: `rows` names each value's prompt and
    `columns` its start. Both are drawn with replacement, and a value counts as often as its row times its column. It
    errs on the wide side (Owen 2007, theorem 3). Raises ValueError as `cluster_bootstrap`.
    """
    _check_confidence(confidence)
    numbers = _finite(values)
    if not len(rows) == len(columns) == len(numbers):
        raise ValueError(f"{len(numbers)} values but {len(rows)} rows and {len(columns)} columns")
    of_row, of_column = (_numbered(names) for names in (rows, columns))
    rng = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < resamples:  # a resample may miss every value; it has no mean
        weights = [
            rng.multinomial(count, np.full(count, 1 / count)) for count in (of_row.max() + 1, of_column.max() + 1)
        ]
        weight = weights[0][of_row] * weights[1][of_column]
        if weight.sum():
            means.append(float((weight * numbers).sum() / weight.sum()))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def newcombe_difference(first: tuple[int, int], second: tuple[int, int], *, confidence: float = 0.95) -> Interval:
    """Interval of the difference of two independent rates, each (successes, n): Newcombe 1998, method 10.

    Not degenerate where both are 0 or 1.

    >>> low, high = newcombe_difference((56, 70), (48, 80))
    >>> round(low, 4), round(high, 4)
    (0.0524, 0.3339)
    """
    (a, n), (b, m) = first, second
    one, other = wilson(a, n, confidence=confidence), wilson(b, m, confidence=confidence)
    p, q = a / n, b / m
    return Interval(
        p - q - ((p - one.low) ** 2 + (other.high - q) ** 2) ** 0.5,
        p - q + ((one.high - p) ** 2 + (q - other.low) ** 2) ** 0.5,
    )


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Interval:
    """Percentile bootstrap of mean(first − second), drawing pairs (Efron and Tibshirani 1993, section 13.3).

    For one prompt and seed on two models: what both share cancels. `clusters` names each pair's prompt where prompts
    have several images, and prompts are drawn whole. Raises ValueError where the lengths differ or are 0.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths, not {len(first)} and {len(second)}")
    differences = _finite(first) - _finite(second)
    if clusters is not None:
        return cluster_bootstrap(differences.tolist(), clusters, seed=seed, confidence=confidence, resamples=resamples)
    return _bootstrap(differences, np.ones(len(first)), seed=seed, confidence=confidence, resamples=resamples)


def subsampled(
    statistic: Callable[[Sequence[int]], float],
    n: int,
    *,
    size: int,
    draws: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Interval of a statistic of n independent items, by subsamples without replacement (Politis and Romano 1994).

    For what a bootstrap biases, as FID: resampling repeats items, which moves the estimate itself. `statistic` takes
    the indices of the items (sorted, each once), as many as `size` or all n. Their theorem 2.1, with the rate √n: where
    √n·(θ_n − θ) has a limit law and size → ∞ with size/n → 0, the spread of √size·(θ_size − θ_n) is its spread.

    Two departures. Spread is taken around the subsamples' own mean, not around θ_n: a bias that depends on the size
    (FID's is about C/size) would shift the interval by that of the smaller one. So it is an interval of what n items
    give on average, that bias included; compare at equal n. And spread is scaled by √(size/(n − size)), not
    √(size/n), for subsamples of a finite set differ by less: that is exact for the variance of a mean, at any size
    (the jackknife histogram, Wu 1990). Items that come in groups break the assumption.

    Raises ValueError unless 2 ≤ size < n and draws ≥ 2, and where the statistic is not finite.
    """
    _check_confidence(confidence)
    if not 2 <= size < n:
        raise ValueError(f"size is {size}, expected from 2 up and below n, which is {n}")
    if draws < 2:
        raise ValueError(f"draws is {draws}, expected 2 or more")
    rng = np.random.default_rng(seed)
    whole = statistic(range(n))
    parts = [statistic(np.sort(rng.choice(n, size=size, replace=False)).tolist()) for _ in range(draws)]
    values = _finite([whole, *parts])
    roots = (values[1:] - values[1:].mean()) * (size / (n - size)) ** 0.5
    tail = (1 - confidence) / 2
    low, high = np.quantile(roots, [tail, 1 - tail])
    return Interval(float(values[0] - high), float(values[0] - low))


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of few independent, roughly normal `values` (Student 1908).

    A bootstrap of three values is far too narrow; this is not. Raises ValueError for fewer than two values.

    >>> low, high = t_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    numbers = _finite(values)
    if len(numbers) < 2:
        raise ValueError("Student's interval needs at least two values")
    mean = float(numbers.mean())
    half = student_t(len(numbers) - 1, confidence=confidence) * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Interval(mean - half, mean + half)


def student_t(degrees: int, *, confidence: float = 0.95) -> float:
    """The t that |T| stays below with probability `confidence` (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

    >>> round(student_t(2), 3)
    4.303
    """
    _check_confidence(confidence)
    if degrees < 1:
        raise ValueError(f"degrees of freedom are {degrees}, expected 1 or more")
    low, high = 0.0, math.pi / 2  # of θ = atan(t/√degrees), in which the probability rises
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _t_within(theta: float, degrees: int) -> float:
    """P(|T| < √degrees·tan θ)."""
    odd = degrees % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):  # cos^power
        total += term
        term *= math.cos(theta) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): rejecting those below α errs at all with probability ≤ α.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    adjusted, least, left = [0.0] * len(p_values), 0.0, len(p_values)
    for place in sorted(range(len(p_values)), key=p_values.__getitem__):
        least = max(least, min(1.0, left * p_values[place]))
        adjusted[place] = least
        left -= 1
    return adjusted


def _bootstrap(sums: Floats, sizes: Floats, *, seed: int, confidence: float, resamples: int) -> Interval:
    """Percentiles of Σ sums / Σ sizes over resampled units."""
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected 1 or more")
    rng = np.random.default_rng(seed)
    units = len(sums)
    rows = max(1, _BLOCK // units)
    means = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(units, size=(min(rows, resamples - start), units))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _numbered(names: Sequence[Hashable]) -> NDArray[np.int64]:
    """Each name's number, counted as they first come."""
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], dtype=np.int64)


def _finite(values: Sequence[float]) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError("an interval needs a flat list of at least one value")
    if not np.isfinite(numbers).all():
        raise ValueError("an interval needs finite values")
    return numbers


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected between 0 and 1")
