"""How cost grows with work: `docs/performance.md`, `make growth`.

    python benchmarks/growth.py                                   what fits into a quarter of an hour, and the figure
    python benchmarks/growth.py scoring report --largest 100000   what does not
    python benchmarks/growth.py --plot                            docs/growth.svg from the results that are there

Each point (`growth_points.py`) is so much work in a process of its own on one thread: seconds, and the highest resident
size. Points are kept in `docs/results/growth-*.json` as they are made, so a second call goes on, and makes nothing anew
that was measured on the same code and machine; `--anew` does. Run it alone: seconds of a busy machine are worth
nothing (memory does not depend on who else is at work). After `--budget` no further point is begun; the one that is
being measured is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth_points import PREPARED
from results import git, machine

from duo.report.figures import Growth, growth
from duo.rundir import read_json, write_bytes, write_json

DOCS = Path(__file__).parents[1] / "docs"
SIZES = {  # by what grows; the quickest first, so that a budget cuts off the longest
    "report": (200, 2000, 20_000, 100_000),
    "cells": (1, 2, 4, 8),
    "processes": (1, 2),
    "pairs": (16, 64, 256, 1024),
    "prompts": (100, 1000, 10_000),
    "scoring": (800, 8000, 24_000, 100_000),
}
# What runs without `--largest`; the rest takes longer than a quarter of an hour in all.
USUAL = {"pairs": 256, "prompts": 1000, "scoring": 8000}
WORDS = {
    "report": ("Report", "judged images"),
    "cells": ("Bench cells, 4 an erasure", "erasures"),
    "processes": ("One run, 400 prompts", "processes"),
    "pairs": ("Pairs", "pairs"),
    "prompts": ("Attack and scores, 2 steps", "prompts"),
    "scoring": ("Score stage", "judged images"),
}


def measured(what: str, n: int) -> dict[str, Any]:
    """One point, in processes of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DUO_CACHE": ""}
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        command = [sys.executable, str(Path(__file__).with_name("growth_points.py")), what, str(n), "--folder", folder]
        if what in PREPARED:
            subprocess.run([*command, "--prepare"], check=True, env=environment, stdout=subprocess.DEVNULL)
        made = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        told: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
        return told


def about() -> dict[str, Any]:
    """What must be the same for two points to stand in one table: machine, threads and the package's code."""
    return {**machine(), "threads": 1, "code": git("rev-parse", "HEAD:src")}


def kept(path: Path, now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The points in a file of results that are of this code on this machine."""
    if not path.exists():
        return {}
    told = read_json(path)
    same = all(told.get(key) == now[key] for key in ("machine", "threads", "code")) and "dirty" not in {**told, **now}
    return dict(told["found"]) if same else {}


def plot(results: Path) -> None:
    """`docs/growth.svg` from the files of results."""
    panels = []
    for what, (title, unit) in WORDS.items():
        path = results / f"growth-{what}.json"
        if path.exists():
            points = sorted(read_json(path)["found"].values(), key=lambda point: point["n"])
            panels.append(
                Growth(
                    title=title,
                    unit=unit,
                    n=[point["n"] for point in points],
                    seconds=[point["seconds"] for point in points],
                    mib=[point["peak_mib"] for point in points],
                    shared=what == "processes",
                )
            )
    if panels:
        write_bytes(DOCS / "growth.svg", growth(panels).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(SIZES)}; all of them if none is named")
    parser.add_argument("--largest", type=int, help="also what is larger than is usual, up to so much")
    parser.add_argument("--budget", type=float, default=15, help="minutes, after which no further point is begun")
    parser.add_argument("--anew", action="store_true", help="leave what was measured before")
    parser.add_argument("--plot", action="store_true", help="nothing but the figure")
    parser.add_argument("--results", type=Path, default=DOCS / "results")
    given = parser.parse_args()
    if unknown := set(given.what) - set(SIZES):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(SIZES)}")
    end, left = time.monotonic() + 60 * given.budget, []
    for what in () if given.plot else given.what or SIZES:
        path, now = given.results / f"growth-{what}.json", about()
        found = {} if given.anew else kept(path, now)
        most = given.largest if given.largest is not None else USUAL.get(what, max(SIZES[what]))
        for n in (one for one in SIZES[what] if one <= most and str(one) not in found):
            if time.monotonic() > end:
                left.append(f"{what} {n:,}")
                continue
            found[str(n)] = measured(what, n)
            write_json(path, {**now, "found": found})
            print(what, f"{n:,}", {key: round(value, 2) for key, value in found[str(n)].items()}, flush=True)
    plot(given.results)
    if left:
        print(f"left for another call, as {given.budget:g} minutes are over: {', '.join(left)}")


if __name__ == "__main__":
    main()
