"""How cost grows with work: `docs/performance.md`.

    python benchmarks/growth.py report --out docs/results/growth-report.json
    python benchmarks/growth.py stages --out docs/results/growth-stages.json

`report` writes the page of made-up runs (those of the tests) of more and more judged images, each in a process of its
own, and tells seconds and the highest resident size. `stages` makes more and more pairs, and judges more and more
images, on the embedded model. Run it alone: numbers of a busy machine are worth nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import machine

from duo import Session, load_recipe, make_pairs
from duo.report import write_report
from duo.rundir import write_json
from duo.stages import attack, score

SETS, MODELS = 10, 2  # of a made-up run: attack rows, near misses and unrelated images; on two models
IMAGES = (10, 100, 1000, 5000)  # of each set and model: 200 … 100,000 rows
PAIRS = (16, 64, 256, 1024)
PROMPTS = (100, 1000, 10_000)


def made_up(folder: Path, images: int) -> Path:
    """A finished run of so many images a set, whose pictures are a few files under many names."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
    import synthetic

    drawn: dict[Any, Path] = {}
    save = synthetic._save

    def linked(path: Path, scene: Any, *, seed: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if scene in drawn:
            os.link(drawn[scene], path)
        else:
            save(path, scene, seed=seed)
            drawn[scene] = path

    with mock.patch.object(synthetic, "_save", linked):
        return Path(synthetic.write_run(folder, images=images))


def report_of(folder: Path) -> dict[str, Any]:
    """Seconds, the highest resident size and the page's size, of this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    page = write_report(folder)
    return {
        "seconds": time.perf_counter() - start,
        "mib_before": before / 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "page_mib": page.stat().st_size / 2**20,
    }


def reports(largest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for images in (one for one in IMAGES if one <= largest):
        with tempfile.TemporaryDirectory() as folder:
            run = made_up(Path(folder) / "run", images)
            rows = len((run / "score" / "verdicts.jsonl").read_text().splitlines())
            command = [sys.executable, __file__, "report", "--run", str(run)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            yield f"report of {rows:,} images", {"rows": rows, **told}


def stages(largest: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of making pairs, and of rendering and judging plain prompts on the original and an erased model."""
    recipe = load_recipe("toybox-fire-uce")
    for n in (one for one in PAIRS if one <= largest):
        with tempfile.TemporaryDirectory() as folder:
            session = Session(replace(load_recipe("toybox-fire"), pairs=replace(recipe.pairs, n=n)), Path(folder))
            yield f"{n:,} pairs", {"n": n, "seconds": _timed(lambda session=session: make_pairs(session))}  # type: ignore[misc]
    for n in (one for one in PROMPTS if one <= largest):
        with tempfile.TemporaryDirectory() as folder:
            row = replace(recipe.attacks[0], images=n)
            bare = replace(recipe.score.without_besides(), unrelated=1, near_miss=0, unsafe_row=row.row)
            session = Session(replace(recipe, attacks=(row,), score=bare), Path(folder))
            seconds = _timed(lambda session=session: _evaluated(session))  # type: ignore[misc]
            yield f"{n:,} images on each of two models, judged", {"n": n, "seconds": seconds}


def _evaluated(session: Session) -> None:
    from duo import erase

    erase(session)
    attack(session)
    score(session)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("report", "stages"))
    parser.add_argument("--largest", type=int, default=10**9, help="leave out what is larger")
    parser.add_argument("--run", type=Path, help="write the report of this run, and tell what it took")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.run:
        print(json.dumps(report_of(given.run)))
        return
    torch.set_num_threads(1)
    found = {}
    for name, told in (reports if given.what == "report" else stages)(given.largest):
        found[name] = told
        print(name, {key: round(value, 3) for key, value in told.items()}, flush=True)
    if given.out:
        write_json(given.out, {**machine(), "threads": 1, "found": found})


if __name__ == "__main__":
    main()
