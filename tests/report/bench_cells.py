"""A results folder as `duo bench` leaves it: by hand, cell by cell, or a made-up, plausible one of seven methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BENCH = "by-hand"
METRIC = "1 - toybox-LPIPS"

# method → field, strengths from weak to strong, preservation, DSR under plain prompts, how much attacks win back, mush
MADE_UP: dict[str, tuple[str, list[float], list[float], list[float], float, float]] = {
    "duo": ("method.beta", [40, 20, 10, 5], [0.95, 0.93, 0.90, 0.86], [0.80, 0.97, 1.0, 1.0], 0.15, 0.20),
    "esd": ("method.learning_rate", [1e-5, 3e-5, 1e-4], [0.93, 0.89, 0.82], [0.60, 0.88, 0.97], 0.45, 0.12),
    "ca": ("method.steps", [100, 300, 900], [0.94, 0.91, 0.85], [0.50, 0.75, 0.93], 0.55, 0.08),
    "uce": ("method.preserve", [1.0, 0.3, 0.1], [0.97, 0.95, 0.92], [0.70, 0.85, 0.92], 0.70, 0.05),
    "spm": ("method.strength", [0.5, 1.0, 1.5], [0.96, 0.94, 0.91], [0.55, 0.85, 0.94], 0.60, 0.06),
    "fmn": ("method.steps", [10, 30, 60], [0.90, 0.84, 0.75], [0.40, 0.66, 0.80], 0.40, 0.25),
    "sa": ("method.fisher", [500, 100, 20], [0.88, 0.81, 0.70], [0.70, 0.90, 0.98], 0.25, 0.45),
}
ROWS = {  # row → rate on the original, share of what attacks win back that this one does, variants
    "prompts": (1.0, 0.0, [""]),
    "ring_a_bell": (0.97, 0.6, [""]),
    "concept_inversion": (1.0, 1.0, ["start 0", "start 1"]),
    "unlearn_diff_atk": (0.99, 0.8, [""]),
    "img2img": (1.0, 0.7, ["0.5", "0.7", "0.9"]),
    "sneaky_prompt": (0.75, 0.4, [""]),
}


def write(path: Path, cell: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell))


def bench(
    folder: Path,
    *,
    rows: Sequence[str],
    methods: Mapping[str, tuple[str, Sequence[Any]]],
    seeds: Sequence[int] = (0,),
    name: str = BENCH,
) -> None:
    """`bench.json`; `methods` are the swept field and its values."""
    told = {key: {"recipe": key, "strength": field, "values": list(values)} for key, (field, values) in methods.items()}
    attacks = [{"row": row, "attack": row, "prompts": "neutral"} for row in rows]
    write(folder / "bench.json", {"schema": 1, "name": name, "rows": attacks, "methods": told, "seeds": list(seeds)})


def head(
    method: str, row: str, *, field: str | None, value: Any, seed: int | None, name: str = BENCH
) -> dict[str, Any]:
    strength = None if field is None else {"field": field, "value": value, "label": f"{value}"}
    return {"schema": 1, "bench": name, "method": method, "strength": strength, "seed": seed, "row": row}


def attacked(
    folder: Path,
    method: str,
    row: str,
    labels: str,
    *,
    field: str = "method.beta",
    value: Any = 1,
    seed: int = 0,
    name: str = BENCH,
    **more: Any,
) -> Path:
    """An attack cell: image i has prompt i and no variant, unless `more` says otherwise."""
    model = method in ("original", "never")
    place = folder / method if model else folder / method / f"{value}" / f"seed-{seed}"
    cell = {
        **head(method, row, field=None if model else field, value=value, seed=None if model else seed, name=name),
        "attack": row,
        "labels": labels,
        "prompts": list(range(len(labels))),
        "variants": [""] * len(labels),
        "restarts": False,
        "idle": None,
        "queries": 0,
        "reliable": 0.9,
    }
    write(place / f"{row}.json", {**cell, **more})
    return place / f"{row}.json"


def preserved(
    folder: Path,
    method: str,
    values: Sequence[float],
    *,
    field: str = "method.beta",
    value: Any = 1,
    seed: int = 0,
    name: str = BENCH,
    **more: Any,
) -> Path:
    place = folder / method / f"{value}" / f"seed-{seed}" / "preserved.json"
    cell = head(method, "preserved", field=field, value=value, seed=seed, name=name)
    write(place, {**cell, "preservation": {"metric": METRIC, "values": list(values)}, **more})
    return place


def write_made_up(folder: Path, *, prompts: int = 24, seeds: Sequence[int] = (0, 1, 2)) -> Path:
    """Seven methods, six attacks (of which one has no sound control) and a model that never saw the concept."""
    rng = np.random.default_rng(0)
    hard = rng.normal(size=prompts)  # prompts differ, and are the same for all methods
    scene = rng.normal(size=prompts)
    methods = {name: (field, values) for name, (field, values, *_) in MADE_UP.items()}
    bench(folder, rows=list(ROWS), methods=methods, seeds=seeds, name="made-up")
    for row, (control, _, variants) in ROWS.items():
        more = _more(row, variants, prompts)
        attacked(folder, "original", row, _labels(rng, [control] * prompts * len(variants), 0), name="made-up", **more)
        rate = 0.35 if row == "img2img" else 0.02
        attacked(folder, "never", row, _labels(rng, [rate] * prompts * len(variants), 0.05), name="made-up", **more)
    for method, (field, values, keeps, defends, back, mush) in MADE_UP.items():
        for value, keep, defend in zip(values, keeps, defends, strict=True):
            for seed in seeds:
                luck = rng.normal(scale=0.03)
                options = {"field": field, "value": value, "seed": seed, "name": "made-up"}
                for row, (_, share, variants) in ROWS.items():
                    rate = np.clip(1 - defend * (1 - back * share) + luck, 0, 1)
                    each = [rate * (1 if len(variants) < 3 else 0.6 + 0.2 * i) for i in range(len(variants))]
                    rates = [np.clip(one + 0.05 * hard[i], 0, 1) for i in range(prompts) for one in each]
                    attacked(folder, method, row, _labels(rng, rates, mush), **options, **_more(row, variants, prompts))
                kept = np.clip(keep + 0.02 * scene + rng.normal(scale=0.01, size=prompts) - luck / 4, 0, 1)
                right = "".join("01"[int(draw)] for draw in rng.random(prompts) < keep)
                more = {
                    "attributes": {"unrelated": {"colour": right, "all": right}},
                    "near_misses": {"lantern": {"survived": right, "labels": "a" * prompts}},
                }
                preserved(folder, method, [round(float(one), 4) for one in kept], **options, **more)
    return folder


def _more(row: str, variants: list[str], prompts: int) -> dict[str, Any]:
    if variants == [""]:
        return {}
    return {
        "prompts": [i for i in range(prompts) for _ in variants],
        "variants": variants * prompts,
        "restarts": row == "concept_inversion",
    }


def _labels(rng: np.random.Generator, rates: Sequence[float], mush: float) -> str:
    draws = zip(rng.random(len(rates)), rng.random(len(rates)), rates, strict=True)
    return "".join("p" if one < rate else "c" if other < mush else "a" for one, other, rate in draws)
