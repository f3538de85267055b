"""The strength of an erasure: which value to try next, and which one to take. No torch, no files.

The stronger an erasure, the seldomer the concept comes back and the less is kept of unrelated pictures. So what is
looked for is the weakest value that erases enough: from the recipe's value outwards until one value erases enough and
a weaker one does not, then between these two, halving the gap on a logarithmic scale (bisection). That order only says
where to look. What is taken is the best of what was measured, and where the measured points are not in order, that is
told. The next value depends on the points alone, so that a search that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from duo.fields import LeafConfig, check_above_0_or_none
from duo.recipe import Recipe

Number = int | float

FIRST, FURTHER = 2.0, 4.0  # by what factor a search goes outwards, at first and then
CLOSE = 1.25  # two values that are no further apart are not halved again: one seed's noise is more than they differ by
DIGITS = 3  # that count, of a value that the search made up
SLACK = 1e-9  # for rounding


@dataclass(frozen=True, kw_only=True)
class StrengthSearch:
    """What an erasure is to meet on validation prompts, and how far a search for its strength may go.

    Of the attack rows that it looks at, at most `target_rate` of the images of each may show the concept; unrelated
    pictures must keep at least `min_preservation` by the recipe's metric. What is compared are the rate and the mean
    themselves; `strict` compares the worse ends of their 95% intervals, as `duo check` does.

    `strength` is the field of the method that is varied, from the recipe's value on and within `weakest` and
    `strongest`; None: the one that the method names. A larger value must erase more. `max_runs` counts erasures.
    `search_rows` are rows of the recipe's attacks; none: those that ask by prompts alone. `search_images` are those of
    each row and of unrelated prompts in one run; None: the recipe's.
    """

    target_rate: float
    min_preservation: float
    strength: str | None = None
    weakest: float | None = None
    strongest: float | None = None
    max_runs: int = 6
    search_rows: tuple[str, ...] = ()
    search_images: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("target_rate", "min_preservation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name):g}, expected a share from 0 to 1, such as 0.02")
        if self.strict and self.target_rate == 0:
            raise ValueError("target_rate is 0, which no number of images can show; give another, or leave out strict")
        check_above_0_or_none(self, "weakest", "strongest")
        for name in ("weakest", "strongest"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} is inf, expected a finite number")
        if self.weakest is not None and self.strongest is not None and self.weakest > self.strongest:
            raise ValueError(f"weakest is {self.weakest:g}, above strongest, {self.strongest:g}; swap them")
        for name in ("max_runs", "search_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share or a mean of n images, with its 95% interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One erasure of a search, and what came of it on validation prompts.

    `rate` is the share of images with the concept, of the attack row that brings it back most, `row`. `spoiled` is the
    share of spoiled images in the row that has most of them. Nothing was measured of a trial that diverged.
    """

    value: Number
    row: str = ""
    rate: Estimate | None = None
    spoiled: Estimate | None = None
    preservation: Estimate | None = None

    @property
    def diverged(self) -> bool:
        return self.rate is None or self.preservation is None

    def erases(self, asked: StrengthSearch) -> bool:
        """Whether the concept comes back seldom enough. A trial that diverged was too strong, and counts as such."""
        if self.rate is None:
            return True
        return (self.rate.high if asked.strict else self.rate.mean) <= asked.target_rate + SLACK

    def keeps(self, asked: StrengthSearch) -> bool:
        """Whether enough is kept of unrelated pictures."""
        if self.preservation is None:
            return False
        return (self.preservation.low if asked.strict else self.preservation.mean) >= asked.min_preservation - SLACK

    def shortfall(self, asked: StrengthSearch) -> float:
        """By how much it misses the two bounds together, as shares; 0 where it meets both."""
        if self.rate is None or self.preservation is None:
            return math.inf
        rate = self.rate.high if asked.strict else self.rate.mean
        kept = self.preservation.low if asked.strict else self.preservation.mean
        return max(0.0, rate - asked.target_rate) + max(0.0, asked.min_preservation - kept)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search saw, weakest value first, and the value that it chose; None where no trial meets both bounds.

    `field` is the method's. `judge` decided, on the attack rows `rows`; `metric` measured what was kept. `ended` says
    why no further value was tried; it is empty of a search that is not finished.
    """

    field: str
    asked: StrengthSearch
    rows: tuple[str, ...]
    judge: str
    metric: str
    trials: tuple[Trial, ...]
    chosen: Number | None
    ended: str

    @property
    def best(self) -> Trial | None:
        """The trial that was chosen."""
        return next((one for one in self.trials if one.value == self.chosen), None)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with the chosen value in place of its own. Raises ValueError where none was chosen."""
        if self.chosen is None:
            raise ValueError("no value was chosen")
        return with_strength(recipe, self.field, self.chosen)


def with_strength(recipe: Recipe, field: str, value: Number) -> Recipe:
    """The recipe with another value in a field of its method."""
    assert recipe.method is not None
    settings = {**recipe.method.settings, field: value}
    return replace(recipe, method=LeafConfig(name=recipe.method.name, settings=settings))


def choose(trials: Sequence[Trial], asked: StrengthSearch) -> Trial | None:
    """Of the trials that meet both bounds the one that keeps most; of equal ones the weakest."""
    meeting = [one for one in trials if one.erases(asked) and one.keeps(asked)]
    return max(meeting, key=lambda one: (one.preservation.mean if one.preservation else 0.0, -one.value), default=None)


def nearest(trials: Sequence[Trial], asked: StrengthSearch) -> Trial | None:
    """The trial that misses the bounds by least; None where all diverged."""
    measured = [one for one in trials if not one.diverged]
    return min(measured, key=lambda one: (one.shortfall(asked), one.value), default=None)


def next_value(trials: Sequence[Trial], asked: StrengthSearch, *, start: Number) -> tuple[Number | None, str]:
    """The value to try next, beginning at `start`; or None, and why the search ends."""
    if not trials:
        return _within(start, asked, whole=isinstance(start, int)), ""
    if len(trials) >= asked.max_runs:
        return None, f"as many runs as were allowed: {asked.max_runs}"
    whole, values = isinstance(start, int), [one.value for one in trials]
    enough = min((one.value for one in trials if one.erases(asked)), default=None)
    below = [one for one in trials if enough is None or one.value < enough]
    short = max(below, key=lambda one: one.value, default=None)  # the strongest that erases too little
    factor = FIRST if len(trials) == 1 else FURTHER
    if enough is None:
        return _outwards(max(values) * factor, values, asked, whole=whole)
    if short is None:
        return _outwards(min(values) / factor, values, asked, whole=whole)
    if not short.keeps(asked) and choose(trials, asked) is None:
        if any(one.keeps(asked) for one in below):
            told = "erases too little and yet keeps too little: a stronger one keeps less, a weaker one erases less"
            return None, f"{short.value:g} {told}"
        return _outwards(min(values) / factor, values, asked, whole=whole)
    middle = _rounded(math.sqrt(short.value * enough), whole=whole)
    if enough / short.value <= CLOSE + SLACK or middle in values:
        return None, f"{short.value:g} erases too little and {enough:g} enough: nothing between them is worth a run"
    return middle, ""


def _outwards(
    value: float, values: Sequence[Number], asked: StrengthSearch, *, whole: bool
) -> tuple[Number | None, str]:
    """A value beyond those tried, or None where that is beyond what was allowed."""
    if not 0 < value < math.inf:
        return None, f"there is no number beyond {max(values) if value > 0 else min(values):g}"
    found = _within(_rounded(value, whole=whole), asked, whole=whole)
    if found in values:
        side = "weakest" if found == min(values) else "strongest"
        return None, f"the {side} value that may be tried was tried: {found:g}"
    return found, ""


def _within(value: Number, asked: StrengthSearch, *, whole: bool) -> Number:
    low, high = asked.weakest, asked.strongest
    within = max(value if low is None else low, value)
    within = within if high is None else min(high, within)
    return int(within) if whole else within


def _rounded(value: float, *, whole: bool) -> Number:
    return max(1, round(value)) if whole else float(f"{value:.{DIGITS}g}")


# --- in words -------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """ "1.7%" """
    return f"{100 * value:.1f}%"


def kept(value: float) -> str:
    """ "0.9571": gentle erasures differ in the third digit and the fourth"""
    return f"{value:.4f}"


def standing(trial: Trial, asked: StrengthSearch) -> str:
    """What a trial is to the bounds, in a few words."""
    if trial.diverged:
        return "diverged"
    if trial.erases(asked):
        return "meets both" if trial.keeps(asked) else "keeps too little"
    return "erases too little" if trial.keeps(asked) else "erases and keeps too little"


def bounds(asked: StrengthSearch) -> str:
    """ "at most 2.0% with the concept, at least 0.95 kept" """
    told = f"at most {share(asked.target_rate)} with the concept, at least {asked.min_preservation:g} kept"
    return f"{told}, by the ends of 95% intervals" if asked.strict else told


def verdict(outcome: Outcome) -> list[str]:
    """What a search came to, in sentences."""
    asked, best, lines = outcome.asked, outcome.best, list(_out_of_order(outcome.trials))
    if best is not None:
        lines.append(f"{outcome.field} = {best.value:g} meets both ({bounds(asked)}) and keeps most of those that do")
        lines.append(f"the search ended: {outcome.ended}")
        return lines
    lines.append(f"no value of {outcome.field} that was tried meets both: {bounds(asked)}")
    if (near := nearest(outcome.trials, asked)) is not None:
        lines.append(f"nearest: {near.value:g} {standing(near, asked)} ({_numbers(near)})")
    lines += _sides(outcome)
    return [*lines, f"the search ended: {outcome.ended}"]


def _sides(outcome: Outcome) -> Iterator[str]:
    """On either side, how far the other bound was."""
    asked, measured = outcome.asked, [one for one in outcome.trials if not one.diverged]
    enough = [one for one in measured if one.erases(asked)]
    enough_kept = [one for one in measured if one.keeps(asked)]
    if enough:
        first = min(enough, key=lambda one: one.value)
        yield f"the weakest that erases enough: {first.value:g} ({_numbers(first)})"
    else:
        yield "none erased enough"
    if enough_kept:
        last = max(enough_kept, key=lambda one: one.value)
        yield f"the strongest that keeps enough: {last.value:g} ({_numbers(last)})"
    else:
        yield "none kept enough"


def _numbers(trial: Trial) -> str:
    assert trial.rate is not None and trial.preservation is not None
    return f"concept in {share(trial.rate.mean)} of {trial.rate.n} images, kept {kept(trial.preservation.mean)}"


def _out_of_order(trials: Sequence[Trial]) -> Iterator[str]:
    """Where a stronger value let more through, or kept more, than the next weaker one; as the numbers are printed."""
    measured = sorted((one for one in trials if not one.diverged), key=lambda one: one.value)
    for weak, strong in pairwise(measured):
        for what, before, after, shown in (
            ("let more through", weak.rate, strong.rate, share),
            ("kept more", weak.preservation, strong.preservation, kept),
        ):
            assert before is not None and after is not None
            now, then = shown(after.mean), shown(before.mean)
            if after.mean > before.mean and now != then:
                chance = "" if after.low > before.high else "; their intervals overlap, so it may be chance"
                yield f"not monotone: {strong.value:g} {what} than {weak.value:g} ({now} to {then}{chance})"
