"""Rates and means over prompts × erasures, and their 95% intervals. No torch.

Two things vary at random: the prompts (with their noise), which all erasures share, and the erasures, one a seed. Both
are drawn whole and crossed (the pigeonhole bootstrap, Owen 2007, as `duo.statistics.crossed_bootstrap`). The same draws
of prompts serve every method and strength, and those of erasures every strength of a method, so that differences of
methods are paired by image and areas are computed draw by draw. A seed is no pair across methods: what it starts is
another training.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo.scores import FEW
from duo.statistics import Interval, holm, newcombe_difference, student_t, t_interval, wilson

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One erasure's images of one prompt set: of each prompt the `sums` and `counts` of values, (prompts,) each."""

    prompts: str
    sums: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.counts.sum())


@dataclass(kw_only=True, eq=False)
class Draws:
    """How often each prompt and each erasure is drawn in each of `resamples`, made once for each set and kept."""

    seed: int
    resamples: int
    _made: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def of(self, name: str, n: int) -> Floats:
        """(n, resamples) counts: n draws with replacement from n, the same for the same name."""
        if (name, n) not in self._made:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), n])
            counts = rng.multinomial(n, np.full(n, 1 / n), size=self.resamples).T
            self._made[name, n] = counts.astype(np.float64)
        return self._made[name, n]

    def of_erasures(self, method: str, seeds: Sequence[int]) -> Floats:
        """(seeds, resamples) counts: strengths of one method are drawn together, methods apart."""
        return self.of(f"erasures of {method}: {list(seeds)}", len(seeds))


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A mean over erasures, each of which weighs the same: of its `parts`, which weigh the same too.

    `method` names whose erasures they are; `rate` says that values are 0 or 1 an image, and
    `most` what no image can be above, which an interval ends at.
    """

    method: str
    parts: Mapping[int, tuple[Part, ...]]
    rate: bool = True
    most: float = math.inf

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.parts))

    @property
    def by_seed(self) -> dict[int, float]:
        """Of each erasure, its mean."""
        return {seed: float(np.mean([part.mean for part in self.parts[seed]])) for seed in self.seeds}

    @property
    def value(self) -> float:
        return float(np.mean(list(self.by_seed.values())))

    @property
    def images(self) -> int:
        return sum(int(part.counts.sum()) for parts in self.parts.values() for part in parts)

    @property
    def prompts(self) -> int:
        """The prompts of the erasure that has the fewest; parts of one prompt set share theirs."""
        return min(_distinct(parts) for parts in self.parts.values())

    def only(self, seeds: Iterable[int]) -> Measure:
        """Of these erasures alone."""
        return replace(self, parts={seed: self.parts[seed] for seed in seeds})

    def resampled(self, draws: Draws) -> Floats:
        """The mean in each resample; NaN where one missed every image of an erasure (refused prompts)."""
        rows = []
        for seed in self.seeds:
            means = []
            for part in self.parts[seed]:
                weights = draws.of(part.prompts, len(part.sums))
                with np.errstate(invalid="ignore"):
                    means.append((part.sums @ weights) / (part.counts @ weights))
            rows.append(np.mean(means, axis=0))
        weights = draws.of_erasures(self.method, self.seeds)
        return np.asarray((np.array(rows) * weights).sum(axis=0) / weights.sum(axis=0))

    def prompt_means(self) -> list[float]:
        """Of each prompt, its mean over erasures; for a measure of one part."""
        sums = np.sum([self.parts[seed][0].sums for seed in self.seeds], axis=0)
        counts = np.sum([self.parts[seed][0].counts for seed in self.seeds], axis=0)
        return (sums[counts > 0] / counts[counts > 0]).tolist()  # type: ignore[no-any-return]


def _distinct(parts: Iterable[Part]) -> int:
    used: dict[str, int] = {}
    for part in parts:
        used[part.prompts] = max(used.get(part.prompts, 0), int(np.count_nonzero(part.counts)))
    return sum(used.values())


INTERVALS = {
    "bootstrap": "prompts drawn whole, of the one erasure that there is; it says nothing of other erasures",
    "crossed bootstrap": "prompts and erasures drawn whole and crossed (Owen 2007), percentiles",
    "Wilson": f"widened to Wilson's over prompts, of which there are fewer than {FEW} or no two that differ",
    "t over prompts": f"widened to Student's over prompts, of which there are fewer than {FEW}",
    "t over erasures": f"widened to Student's over erasures, of which there are fewer than {FEW}",
}


def told(measure: Measure, draws: Draws) -> dict[str, Any]:
    """A measure as JSON: mean, interval with its parts (`INTERVALS`), and each erasure's own mean."""
    drawn = measure.resampled(draws)
    interval = interval_of(measure, drawn)
    few = "Wilson" if measure.rate else "t over prompts"
    return {
        "mean": measure.value,
        "low": interval.low,
        "high": interval.high,
        "images": measure.images,
        "prompts": measure.prompts,
        "by_seed": {str(seed): value for seed, value in measure.by_seed.items()},
        "interval": how(len(measure.seeds), widened=[few] if _thin(measure.prompts, drawn) else []),
    }


def how(erasures: int, *, widened: Sequence[str] = ()) -> str:
    """What an interval is made of, by the keys of `INTERVALS`; `widened` is what few prompts ask for."""
    parts = ["crossed bootstrap" if erasures > 1 else "bootstrap", *widened]
    return " + ".join([*parts, *(["t over erasures"] if 1 < erasures < FEW else [])])


def interval_of(measure: Measure, drawn: Floats, *, confidence: float = 0.95) -> Interval:
    """Percentiles of what was `drawn` (`Measure.resampled`), widened where there was little to draw from.

    A bootstrap of few is too narrow. Of fewer than `FEW` prompts, or where no resample differs, the interval is
    widened to Wilson's over prompts (for means to Student's); of fewer than `FEW` erasures to Student's over erasures,
    which with three is 4.3 standard errors. One erasure says nothing of others, and its interval is over prompts alone.
    Restarts of an attack belong to their erasure, and are drawn with it. On simulated rates of 24 prompts, 3 erasures,
    95 to 99% of these intervals hold the truth; of the bare percentiles it is 91% where erasures differ much.
    """
    value, n = measure.value, measure.prompts
    intervals = [_percentiles(drawn, confidence)]
    if _thin(n, drawn):
        if measure.rate:
            intervals.append(wilson(round(value * n), n, confidence=confidence))
        elif n > 1:
            intervals.append(t_interval(measure.prompt_means(), confidence=confidence))
    widest = _widened(intervals, value, [list(measure.by_seed.values())], confidence)
    least, most = (0.0, 1.0) if measure.rate else (-math.inf, measure.most)
    return Interval(max(least, widest.low), min(most, widest.high))


def difference(name: str, first: Measure, second: Measure, draws: Draws) -> Difference:
    """first − second, two rates of the same prompts on erasures of two methods: paired by image, for prompts are drawn
    together.

    Widened as `interval_of`, with Newcombe's in the place of Wilson's, and Welch's in that of Student's.
    """
    drawn, n = first.resampled(draws) - second.resampled(draws), min(first.prompts, second.prompts)
    counts = [(round(one.value * n), n) for one in (first, second)]
    each = [list(one.by_seed.values()) for one in (first, second)]

    def at(confidence: float) -> Interval:
        intervals = [_percentiles(drawn, confidence)]
        if _thin(n, drawn):
            intervals.append(newcombe_difference(*counts, confidence=confidence))
        return _widened(intervals, first.value - second.value, each, confidence)

    return Difference(name=name, value=first.value - second.value, at=at)


def drawn_interval(
    drawn: Floats, value: float, by_seed: Sequence[Sequence[float]], *, confidence: float = 0.95
) -> Interval:
    """The interval of anything computed draw by draw (an area, or the difference of two).

    `by_seed` has what each erasure gives alone, method by method.
    """
    return _widened([_percentiles(drawn, confidence)], value, by_seed, confidence)


def p_value(interval_at: Callable[[float], Interval], *, least: float) -> float:
    """Two-sided: one less the highest confidence at which the interval leaves 0 out, not below `least`.

    So a test and its interval never contradict each other. `interval_at` gives the interval of a confidence, wider for
    a higher one.
    """

    def leaves_out_zero(p: float) -> bool:
        low, high = interval_at(1 - p)
        return low > 0 or high < 0

    if leaves_out_zero(least):
        return least
    low, high = least, 1.0  # at `low` 0 is within; p is where that ends
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if leaves_out_zero(middle) else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """The reference less the rival `name`; `at` gives the interval of a confidence."""

    name: str
    value: float
    at: Callable[[float], Interval]


def against_rivals(differences: Sequence[Difference], draws: Draws) -> list[dict[str, Any]]:
    """Differences of the reference to each rival as JSON, with p-values adjusted for the rivals (Holm 1979)."""
    p_values = [p_value(one.at, least=2 / draws.resamples) for one in differences]
    return [
        {
            "method": one.name,
            "difference": one.value,
            "low": one.at(0.95).low,
            "high": one.at(0.95).high,
            "p": p,
            "p_holm": adjusted,
        }
        for one, p, adjusted in zip(differences, p_values, holm(p_values), strict=True)
    ]


def _thin(prompts: int, drawn: Floats) -> bool:
    """Whether there are too few prompts for a bootstrap of them, or nothing that differs."""
    return bool(prompts < FEW or np.nanmin(drawn) == np.nanmax(drawn))


def _percentiles(drawn: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _widened(
    intervals: Sequence[Interval], value: float, by_seed: Sequence[Sequence[float]], confidence: float
) -> Interval:
    """The widest of all, with that over few erasures around `value`, and `value` itself in it."""
    half = _over_erasures([one for one in by_seed if 1 < len(one) < FEW], confidence)
    intervals = [*intervals, Interval(value - half, value + half)]
    return Interval(min(one.low for one in intervals), max(one.high for one in intervals))


def _over_erasures(groups: Sequence[Sequence[float]], confidence: float) -> float:
    """Half the width of Student's interval of a mean, or of Welch's (1947) of a difference of two, 0 of none.

    The degrees of freedom are Satterthwaite's (1946), rounded down.
    """
    variances = [float(np.var(group, ddof=1)) / len(group) for group in groups]
    if sum(variances) < 1e-18:  # erasures that agree, but for rounding
        return 0.0
    spread = sum(variance**2 / (len(group) - 1) for variance, group in zip(variances, groups, strict=True))
    degrees = int(sum(variances) ** 2 / spread + 1e-9)
    return float(student_t(degrees, confidence=confidence) * sum(variances) ** 0.5)
