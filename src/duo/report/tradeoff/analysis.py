"""Figure 4 from the cells of a bench: defence success against prior preservation, method by method. No torch.

Defence success (DSR) is the share of an attack row's images without the concept, preservation the mean over unrelated
images; each erasure (seed) weighs the same. Every number has a 95% interval and says how it was made
(`duo.report.tradeoff.measures`). The same cells give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duo.report.tradeoff.cells import Results, read_results
from duo.report.tradeoff.figure import figure4
from duo.report.tradeoff.matched import matched
from duo.report.tradeoff.measures import (
    INTERVALS,
    Difference,
    Draws,
    Floats,
    Measure,
    against_rivals,
    drawn_interval,
    how,
    told,
)
from duo.report.tradeoff.points import (
    CLEAN,
    WORST,
    Grid,
    Point,
    clean,
    defended,
    highest,
    over_rows,
    spoiled,
    success_of,
    told_or_none,
)
from duo.report.tradeoff.staircase import area, on_front
from duo.report.tradeoff.words import tables
from duo.rundir import write_bytes, write_json

SCHEMA = 1
SEED, RESAMPLES = 0, 4000
FLOORS = (0.85, 0.90, 0.95)
OVER = (0.8, 1.0)  # preservations that the area is taken over
REFERENCE = "duo"


def write_tradeoff(results: Path, out: Path) -> list[Path]:
    """Write `figure4.svg`, `figure4.json` and `figure4.md` into the folder `out`, from the results folder of a bench.

    The grid may be incomplete: the files say which cells are missing. Raises `UserError` for cells that are broken, and
    writes nothing then.
    """
    analysis = analyse(read_results(results))
    svg, text = figure4(analysis), tables(analysis)
    paths = [out / f"figure4.{kind}" for kind in ("svg", "json", "md")]
    write_bytes(paths[0], svg.encode())
    write_json(paths[1], analysis)
    write_bytes(paths[2], text.encode())
    return paths


def analyse(
    results: Results,
    *,
    floors: Sequence[float] = FLOORS,
    over: tuple[float, float] = OVER,
    reference: str = REFERENCE,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """All numbers of the figure, as written to `figure4.json`.

    `floors` are the preservations at which methods are compared, `over` the ends of the preservations that the area is
    taken over, `reference` the method that the others are compared with.
    """
    grid = Grid.of(results)
    draws = Draws(seed=seed, resamples=resamples)
    panels = [_panel(grid, key, draws, over=over, reference=reference) for key in (*grid.row_names, WORST, CLEAN)]
    metric = next((one.kept.metric for one in results.erasures if one.kept), None)
    analysis = {
        "schema": SCHEMA,
        "bench": results.name,
        "metric": metric,
        "confidence": 0.95,
        "resamples": resamples,
        "seed": seed,
        "intervals": INTERVALS,
        "cells": {
            "done": results.done,
            "expected": results.expected,
            "missing": list(results.missing),
            "left_out": list(results.left_out),
        },
        "methods": [
            {"method": one.name, "field": one.field, "strengths": len(one.values), "seeds": grid.seeds_of(one.name)}
            for one in results.methods
        ],
        "reference": reference,
        "rows": [_row(grid, name, draws) for name in grid.row_names],
        "worst_case_over": list(grid.reliable),
        "points": [_point(point, grid, draws) for point in grid.points],
        "over": list(over),
        "panels": panels,
        "matched": [matched(grid, floor, draws, reference=reference) for floor in floors],
    }
    return {key: _rounded(value) for key, value in analysis.items()}


def _rounded(value: Any) -> Any:
    """Floats to six decimals, which is more than any of them is worth, so that machines agree."""
    if isinstance(value, dict):
        return {key: one if key == "strength" else _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


# --- rows and points ----------------------------------------------------------------------------------


def _row(grid: Grid, name: str, draws: Draws) -> dict[str, Any]:
    """An attack row: its positive control, and what a model that never saw the concept gives."""
    control, never = grid.control(name), highest(grid.never, name)
    row = next(row for row in grid.results.rows if row.name == name)
    cell = grid.results.original.get(name)
    return {
        "row": name,
        "attack": row.attack,
        "prompts": row.prompts,
        "reliable": name in grid.sound,
        "needed": cell.reliable if cell else None,
        "control": told(control, draws) if control else None,
        "never": told(never, draws) if never else None,
        "not_defined": {one.method: one.not_defined[name] for one in grid.results.erasures if name in one.not_defined},
    }


def _point(point: Point, grid: Grid, draws: Draws) -> dict[str, Any]:
    """All of one method at one strength."""
    rows: dict[str, Any] = {}
    for name in grid.row_names:
        found = point.success(name)
        if found is None:
            continue
        setting, success = found
        rates = {"corrupted": spoiled, "clean": clean, **({"pooled": defended} if setting else {})}
        rows[name] = {"success": told(success, draws)}
        rows[name] |= {key: told_or_none(point.pooled(name, values), draws) for key, values in rates.items()}
        if setting:
            rows[name]["setting"] = setting
            rows[name]["settings"] = {
                variant: told(point.each((row, variant), defended), draws) for row, variant in point.settings(name)
            }
    return {
        "method": point.method,
        "strength": point.strength,
        "complete_seeds": list(point.complete),
        "preservation": told(point.preservation(), draws) if point.kept else None,
        "rows": rows,
        **over_rows(point, grid, draws),
        "kept": {
            name: told(point.measure({seed: (part,) for seed, part in parts.items()}), draws)
            for name, parts in point.other.items()
        },
    }


# --- panels -------------------------------------------------------------------------------------------


def _panel(grid: Grid, key: str, draws: Draws, *, over: tuple[float, float], reference: str) -> dict[str, Any]:
    """One panel: points with intervals, the Pareto front of all of them, and each method's area."""
    reliable = key in (WORST, CLEAN) or key in grid.sound
    plotted: list[tuple[Point, Measure, Measure]] = []
    for point in grid.points:
        success = success_of(point, grid, key)
        seeds = [seed for seed in success.seeds if seed in point.kept] if success else []
        if success and seeds:
            plotted.append((point, point.preservation().only(seeds), success.only(seeds)))
    points = [
        {
            "method": point.method,
            "strength": point.strength,
            "seeds": list(success.seeds),
            "preservation": _bare(told(kept, draws)),
            "success": _bare(told(success, draws)),
        }
        for point, kept, success in plotted
    ]
    panel: dict[str, Any] = {"panel": key, "reliable": reliable, "points": points, "never": _never(grid, key, draws)}
    if not reliable or not plotted:
        return {**panel, "areas": [], "differences": []}
    x, y = [kept for _, kept, _ in plotted], [success for _, _, success in plotted]
    front = on_front(np.array([one.value for one in x]), np.array([one.value for one in y]))
    shares = on_front(*(np.array([one.resampled(draws) for one in axis]) for axis in (x, y))).mean(axis=1)
    for told_point, marked, share in zip(points, front, shares, strict=True):
        told_point |= {"on_front": bool(marked), "front_share": float(share)}
    areas = {
        name: _Area.of([one[1:] for one in plotted if one[0].method == name], over, draws)
        for name in dict.fromkeys(one[0].method for one in plotted)
    }
    return {
        **panel,
        "areas": [one.told(name) for name, one in areas.items()],
        "differences": _area_differences(areas, reference, draws),
    }


def _bare(value: dict[str, Any]) -> dict[str, float]:
    """Without what `points` has already."""
    return {key: value[key] for key in ("mean", "low", "high")}


def _never(grid: Grid, key: str, draws: Draws) -> dict[str, Any] | None:
    """What a model trained without the concept gives on the panel's y axis."""
    counts = {setting: {0: one} for setting, one in grid.never.items()}
    if key in (WORST, CLEAN) and not set(grid.reliable) <= {row for row, _ in counts}:
        return None  # a worst case over fewer attacks is another thing
    model = Point(method="never", strength=None, counts=counts, kept={}, other={}, complete=(0,))
    return told_or_none(success_of(model, grid, key), draws)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Area:
    """A method's area: its value, that of each resample and of each erasure that all its points have."""

    value: float
    drawn: Floats
    by_seed: Mapping[int, float]
    points: int
    erasures: int

    @classmethod
    def of(cls, curve: Sequence[tuple[Measure, Measure]], over: tuple[float, float], draws: Draws) -> _Area:
        def between(values: Callable[[Measure], Any]) -> Floats:
            x, y = (np.array([values(one[axis]) for one in curve], dtype=np.float64) for axis in (0, 1))
            return area(x, y, low=over[0], high=over[1])

        seeds = set.intersection(*(set(kept.seeds) for kept, _ in curve))
        return cls(
            value=float(between(lambda one: one.value)),
            drawn=between(lambda one: one.resampled(draws)),
            by_seed={seed: float(between(lambda one, s=seed: one.by_seed[s])) for seed in sorted(seeds)},  # type: ignore[misc]
            points=len(curve),
            erasures=len({seed for kept, _ in curve for seed in kept.seeds}),
        )

    def told(self, method: str) -> dict[str, Any]:
        """As JSON. All points are computed anew in each resample.

        `bias` is the mean of the resamples less the value: what taking the best of several noisy points adds, about.
        """
        low, high = drawn_interval(self.drawn, self.value, [list(self.by_seed.values())])
        return {
            "method": method,
            "mean": self.value,
            "low": max(0.0, low),
            "high": min(1.0, high),
            "bias": float(np.nanmean(self.drawn)) - self.value,
            "points": self.points,
            "seeds": self.erasures,
            "by_seed": {str(seed): value for seed, value in self.by_seed.items()},
            "interval": how(self.erasures),
        }


def _area_differences(areas: Mapping[str, _Area], reference: str, draws: Draws) -> list[dict[str, Any]]:
    """The area of the reference less that of each rival."""
    ours = areas.get(reference)
    return (
        against_rivals([_apart(name, ours, theirs) for name, theirs in areas.items() if name != reference], draws)
        if ours
        else []
    )


def _apart(name: str, ours: _Area, theirs: _Area) -> Difference:
    value, drawn = ours.value - theirs.value, ours.drawn - theirs.drawn
    each = [list(one.by_seed.values()) for one in (ours, theirs)]
    return Difference(
        name=name, value=value, at=lambda confidence: drawn_interval(drawn, value, each, confidence=confidence)
    )
