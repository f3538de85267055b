"""One point of `benchmarks/growth.py`: so much work, in a process of its own, which tells seconds and peak memory.

    python benchmarks/growth_points.py scoring 100000 --folder /tmp/scoring

It prints one JSON object. What comes before the work that is measured is done by `--prepare`, in another process, so
that its memory does not count. The peak is `VmHWM`: `ru_maxrss` also counts the
process that started this one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

SETS, MODELS = 10, 2  # of the tests' made-up run: attack rows, near misses and unrelated images; on two models
NEAR_MISSES = 3  # of the embedded concept
ATTACKS = ("prompts", "prompts_held_out_words", "prompts_held_out_subjects")  # rows of the recipe, all of them quick
IN_A_CELL = 40  # images
# Of sampling, where what may grow is all that is done for a prompt but its steps, of which each is as dear as the last.
QUICK: Any = {"num_inference_steps": 2, "guidance_scale": 1.0}


def peak_mib() -> float:
    """The highest resident size that this process has had."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# --- reports ------------------------------------------------------------------------------------------


def prepare_report(folder: Path, rows: int) -> None:
    """A finished run of the tests, whose pictures are a few files under many names."""
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
        synthetic.write_run(folder / "run", images=rows // (SETS * MODELS))


def report(folder: Path, rows: int) -> dict[str, Any]:
    """The page of a run of so many judged images."""
    from duo.report import write_report

    page = write_report(folder / "run")
    return {"page_mib": page.stat().st_size / 2**20}


# --- scoring ------------------------------------------------------------------------------------------


def _scored(folder: Path, rows: int) -> Any:
    """A session that judges `rows` images in all, on two models: a half of an attack, a quarter unrelated prompts, and
    a quarter near misses."""
    from duo import Session, load_recipe

    recipe = load_recipe("toybox-fire-uce")
    own = replace(recipe.attacks[0], images=rows // 4)
    settings = replace(
        recipe.score.without_besides(),
        unrelated=rows // 8,
        near_miss=rows // (8 * NEAR_MISSES),
        unsafe_row=own.row,
        agreement=recipe.score.agreement,
    )
    return Session(replace(recipe, attacks=(own,), score=settings), folder / "run")


def _drawn_at_once(session: Any) -> AbstractContextManager[Any]:
    """The model replaced by sixteen made-up pictures, so that nothing but the stages' own work is measured."""
    import numpy as np

    from duo.toybox.world import COLOURS, SUBJECTS, Scene, render

    rng = np.random.default_rng(0)
    kept = [
        render(
            Scene(
                subject=SUBJECTS[i % len(SUBJECTS)],
                colour=tuple(COLOURS)[i % len(COLOURS)],
                place="meadow",
                hazard="fire" if i < 14 else None,
            ),
            rng,
        )
        for i in range(16)
    ]

    def generate(prompts: Any, *, seeds: Any, **_: Any) -> list[Any]:
        return [kept[seed % len(kept)] for seed in seeds]

    return mock.patch.object(type(session.model), "generate", staticmethod(generate))


def prepare_scoring(folder: Path, rows: int) -> None:
    """A finished attack, and every image that the score stage would draw, at the price of writing it."""
    from duo import erase
    from duo.stages import attack
    from duo.stages.scoring import probe

    session = _scored(folder, rows)
    erase(session)
    with _drawn_at_once(session):
        attack(session)
        with session.at_work("score"):
            probe(session, session.dir.stage("score"))


def scoring(folder: Path, rows: int) -> dict[str, Any]:
    """The score stage with the embedded judge and metrics, of images that are there already."""
    from duo.stages import score

    score(_scored(folder, rows))
    return {}


# --- work with the model --------------------------------------------------------------------------------


def pairs(folder: Path, n: int) -> dict[str, Any]:
    """So many pairs of unsafe images and their safe twins."""
    from duo import Session, load_recipe, make_pairs

    recipe = load_recipe("toybox-fire")
    make_pairs(Session(replace(recipe, pairs=replace(recipe.pairs, n=n)), folder / "run"))
    return {}


def _prompted(folder: Path, n: int, row: str = "prompts", **sampling: Any) -> Any:
    """A session that attacks by so many different prompts, one image each on both models, and little else."""
    from duo import Session, load_recipe
    from duo.promptsets import PromptSource
    from duo.toybox.world import COLOURS, SUBJECTS

    path = folder / "many.csv"
    if not path.exists():
        words = [f"a burning {tuple(COLOURS)[i % len(COLOURS)]} {SUBJECTS[i // 6 % len(SUBJECTS)]}" for i in range(n)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["prompt"], *([f"{text}, number {i}"] for i, text in enumerate(words))])
    recipe = load_recipe("toybox-fire-uce")
    own = replace(recipe.attacks[0], row=row, prompts="many", images=n)
    bare = replace(recipe.score.without_besides(), unrelated=1, near_miss=0, unsafe_row=row)
    several = {"many": PromptSource(path=str(path))}
    recipe = replace(recipe, attacks=(own,), prompt_sets=several, score=bare)
    return Session(replace(recipe, sampling=replace(recipe.sampling, **sampling)), folder / "run")


def prepare_prompts(folder: Path, n: int) -> None:
    """The erasure, which does not depend on how many prompts attack it."""
    from duo import erase

    erase(_prompted(folder, n, **QUICK))


def prompts(folder: Path, n: int) -> dict[str, Any]:
    """So many different prompts, drawn by the original and the erased model in two steps, and judged."""
    from duo.stages import attack, score

    session = _prompted(folder, n, **QUICK)
    attack(session)
    score(session)
    return {}


def cells(folder: Path, n: int) -> dict[str, Any]:
    """A bench of so many erasures by UCE, each under three attacks and with what it kept: what grows is the grid."""
    from duo.bench import lay_out, load_bench
    from duo.engines import here
    from duo.stages import benching

    values = [round(0.3 + i / 10, 2) for i in range(n)]
    rows = "\n".join(
        f'[[attacks]]\nrow = "{name}"\nname = "prompts"\nprompts = "{place}"\nimages = {IN_A_CELL}'
        for name, place in zip(ATTACKS, ("plain", "held_out_words", "held_out_subjects"), strict=True)
    )
    (folder / "rows.toml").write_text(f"[score]\nunrelated = {IN_A_CELL}\nnear_miss = 1\n{rows}\n")
    (folder / "bench.toml").write_text(
        'recipe = "toybox-fire"\nbudget = "rows.toml"\nseeds = [0]\nthreads = 1\n'
        f'[methods.uce]\nrecipe = "toybox-fire-uce"\nstrength = "method.erase_scale"\nvalues = {values}\n'
    )
    grid = lay_out(load_bench(str(folder / "bench.toml")))
    benching.run(grid, out=folder / "out", results=folder / "results", device="cpu", engine=here)
    return {"cells": n * (len(ATTACKS) + 1)}


def processes(folder: Path, n: int) -> dict[str, Any]:
    """One run of 400 prompts on two models by so many processes of one thread each."""
    _prompted(folder, 400)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        'extends = "toybox-fire-uce"\n[prompt_sets.many]\npath = "many.csv"\n'
        '[[attacks]]\nrow = "prompts"\nname = "prompts"\nprompts = "many"\nimages = 400\n'
        '[score]\nunrelated = 1\nnear_miss = 0\ncaptions = "none"\nquality = []\nagreement = "none"\ntwins = 0\n'
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n)]
    one = [sys.executable] if n == 1 else launch
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    out = folder / "run"
    command = [*one, "-m", "duo", "run", str(recipe), "--out", str(out)]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest process; this one is smaller
    return {"peak_mib": peak, **{f"{row['stage']}_seconds": row["seconds"] for row in rows}}


POINTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "report": report,
    "scoring": scoring,
    "pairs": pairs,
    "prompts": prompts,
    "cells": cells,
    "processes": processes,
}
PREPARED: dict[str, Callable[[Path, int], None]] = {
    "report": prepare_report,
    "scoring": prepare_scoring,
    "prompts": prepare_prompts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=POINTS)
    parser.add_argument("n", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.prepare:
        PREPARED[given.what](given.folder, given.n)
        return
    start = time.perf_counter()
    told = POINTS[given.what](given.folder, given.n)
    print(json.dumps({"n": given.n, "seconds": time.perf_counter() - start, "peak_mib": peak_mib(), **told}))


if __name__ == "__main__":
    main()
