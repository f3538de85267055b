"""The memory of scoring without a model: `python benchmarks/scoring_memory.py 640 20000`.

A made-up judge and metric look at images that are one file under many names, by the score stage's own functions, of one
size after the other in one process: the peak after each. It takes seconds where `growth.py scoring`, with the embedded
judge and metrics, takes minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from growth_points import peak_mib
from PIL import Image

from duo import rundir
from duo.plugins import Verdict
from duo.stages import scoring
from duo.stages.scoring import JudgedSet


class Mean:
    """A metric that looks at a pixel."""

    name, higher_is_better = "pixel", True

    def __init__(self) -> None:
        self.values: list[float] = []

    def update(self, *, images: Any, references: Any, prompts: Any) -> None:
        self.values += [
            1 - abs(a.getpixel((0, 0))[0] - b.getpixel((0, 0))[0]) for a, b in zip(images, references, strict=True)
        ]

    def compute(self) -> list[float]:
        return self.values


def judge(images: Any) -> list[Verdict]:
    """Verdicts as large as the embedded judge's."""
    scores = {"absent": 0.25, "present": 0.5, "corrupted": 0.25}
    return [Verdict(label="present" if one.getpixel((0, 0))[0] else "absent", scores=scores) for one in images]


def main() -> None:
    session: Any = SimpleNamespace(
        judge=judge,
        judge_config=SimpleNamespace(name="stub"),
        preservation=Mean,
        recipe=SimpleNamespace(seed=0),
    )
    print(f"before: {peak_mib():.0f} MiB", flush=True)
    for n in map(int, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "one.png")
            for i in range(n):
                os.link(folder / "one.png", folder / f"{i:04d}.png")
            sets = [
                JudgedSet(name="unrelated", model=model, prompts=["p"] * n, seeds=range(n), folder=folder)
                for model in ("original", "erased")
            ]
            stage = rundir.Stage(folder / "stage")
            parts = {(one.name, one.model): scoring.judged(session, stage, one) for one in sets}
            rundir.write_jsonl(folder / "verdicts.jsonl", scoring._verdict_rows(session, sets, given(parts), {}))
            scoring.preservation_of(session, *sets)
            print(f"{2 * n:,} images: {peak_mib():.0f} MiB", flush=True)


def given(parts: Any) -> Any:
    """What rows of verdicts are made from: of older versions of duo, verdicts that were all read."""
    if hasattr(scoring, "verdicts_of"):
        return parts
    return {
        key: [Verdict(**verdict) for record in blocks.records() for verdict in record["verdicts"]]
        for key, blocks in parts.items()
    }


if __name__ == "__main__":
    main()
