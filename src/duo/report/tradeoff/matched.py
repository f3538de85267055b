"""Methods at matched preservation, each at a strength chosen on other data. No torch."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo.report.tradeoff.measures import Draws, Part, against_rivals, difference, told
from duo.report.tradeoff.points import CLEAN, WORST, Counts, Grid, Point, Setting, over_rows, success_of


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The strength that one half of the prompts of one erasure is scored at; None where none keeps enough."""

    seed: int
    half: int
    point: Point | None


def matched(grid: Grid, floor: float, draws: Draws, *, reference: str) -> dict[str, Any]:
    """Methods at the strength that defends best among those that keep `floor`, chosen on other data (cross-fitted).

    Prompts (and unrelated images) are cut into two random halves. What erasure s gives on one half is scored at the
    strength chosen on the other half of the *other* erasures: of the strengths whose preservation there is at least
    the floor, the one whose DSR averaged over reliable rows is highest, then the one that keeps more. One strength
    serves all attacks, as a release has one. All choices together score each image once. A method with one erasure
    alone is chosen on the other half of the same. Intervals hold the choices.

    A method reaches the floor only if every choice found a strength; what it kept where it was scored is told, and may
    be below the floor.
    """
    methods, scored = [], {}
    for name in (method.name for method in grid.results.methods):
        choices = _choices(grid, name, floor, draws)
        if not choices:
            continue
        reached = [one for one in choices if one.point is not None]
        row: dict[str, Any] = {
            "method": name,
            "seeds": sorted({one.seed for one in choices}),
            "choices": len(choices),
            "reached": len(reached),
            "chosen": [
                {"seed": one.seed, "half": one.half, "strength": one.point.strength if one.point else None}
                for one in choices
            ],
        }
        if len(reached) == len(choices):
            point = scored[name] = _assembled(name, choices, draws)
            found = {key: success[1] for key in grid.row_names if (success := point.success(key)) is not None}
            row["preservation"] = told(point.preservation(), draws)
            row["rows"] = {key: told(measure, draws) for key, measure in found.items()}
            row |= over_rows(point, grid, draws)
        methods.append(row)
    differences = []
    for key in (*grid.reliable, WORST, CLEAN):
        rows = _matched_differences(grid, key, scored, reference, draws)
        differences += [{"panel": key, **row} for row in rows]
    return {"floor": floor, "methods": methods, "differences": differences}


def _halves(name: str, n: int, draws: Draws) -> NDArray[np.int64]:
    """0 or 1 for each of a set's prompts, at random, as many of each as can be."""
    rng = np.random.default_rng([draws.seed, zlib.crc32(f"halves of {name}".encode())])
    return np.asarray(rng.permutation(n) % 2)


def _choices(grid: Grid, method: str, floor: float, draws: Draws) -> list[_Choice]:
    points = [point for point in grid.of_method(method) if point.complete]
    seeds = sorted({seed for point in points for seed in point.complete})
    return [
        _Choice(seed=seed, half=half, point=_chosen(points, seed, half, seeds, grid.reliable, floor, draws))
        for seed in seeds
        for half in (0, 1)
    ]


def _chosen(
    points: Iterable[Point],
    seed: int,
    half: int,
    seeds: Sequence[int],
    rows: Sequence[str],
    floor: float,
    draws: Draws,
) -> Point | None:
    """The best of the points that have `seed`, by what its other erasures give on the other half."""
    ranked = []
    for point in points:
        others = [one for one in point.complete if one != seed] if len(seeds) > 1 else [seed]
        if seed not in point.complete or not others:
            continue
        seen = _masked(point, others, 1 - half, draws)
        found = [success[1].value for row in rows if (success := seen.success(row)) is not None]
        if found and seen.kept and (kept := seen.preservation().value) >= floor:
            ranked.append((float(np.mean(found)), kept, point))
    return max(ranked, key=lambda one: one[:2])[2] if ranked else None


def _masked(point: Point, seeds: Sequence[int], half: int, draws: Draws) -> Point:
    """What a point gives on these erasures and this half of the prompts."""
    counts: dict[Setting, dict[int, Counts]] = {}
    for setting, by_seed in point.counts.items():
        own = {seed: by_seed[seed] for seed in seeds if seed in by_seed}
        masked = {seed: one.where(_halves(one.prompts, len(one.images), draws) == half) for seed, one in own.items()}
        counts[setting] = {seed: one for seed, one in masked.items() if one.images.sum()}
    return Point(
        method=point.method,
        strength=point.strength,
        counts=counts,
        most=point.most,
        kept={seed: part for seed in seeds if (part := _half_of(point.kept[seed], half, draws)).counts.any()},
        other={},
        complete=tuple(seeds),
    )


def _half_of(part: Part, half: int, draws: Draws) -> Part:
    mask = _halves(part.prompts, len(part.sums), draws) == half
    return Part(prompts=part.prompts, sums=part.sums * mask, counts=part.counts * mask)


def _assembled(method: str, choices: Sequence[_Choice], draws: Draws) -> Point:
    """The choices as one point: of each erasure both halves, each at the strength chosen for it."""
    counts: dict[Setting, dict[int, Counts]] = {}
    kept: dict[int, Part] = {}
    most = math.inf
    for one in choices:
        assert one.point is not None
        most = one.point.most
        part = _masked(one.point, [one.seed], one.half, draws)
        for setting, by_seed in part.counts.items():
            for seed, value in by_seed.items():
                whole = counts.setdefault(setting, {})
                whole[seed] = whole[seed] + value if seed in whole else value
        own, there = part.kept[one.seed], kept.get(one.seed)
        kept[one.seed] = (
            own
            if there is None
            else Part(prompts=own.prompts, sums=own.sums + there.sums, counts=own.counts + there.counts)
        )
    return Point(
        method=method, strength=None, counts=counts, kept=kept, most=most, other={}, complete=tuple(sorted(kept))
    )


def _matched_differences(
    grid: Grid, key: str, scored: Mapping[str, Point], reference: str, draws: Draws
) -> list[dict[str, Any]]:
    """The reference less each rival, on the same prompts and noise."""
    ours = success_of(scored[reference], grid, key) if reference in scored else None
    if ours is None:
        return []
    rivals = {name: success_of(point, grid, key) for name, point in scored.items() if name != reference}
    return against_rivals([difference(name, ours, theirs, draws) for name, theirs in rivals.items() if theirs], draws)
