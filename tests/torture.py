"""`make torture`: the long forms of the crash tests and of the hostile files, and what they counted, in one file.

What was tried of the hostile files is gathered in a log, so that they may be stopped and gone on with by the same
command: a test that has passed with the same code and as many cases is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from duo.rundir import read_jsonl

HERE = Path(__file__).parent
PARTS = ("crashes", "hostile")
NOTHING_LEFT, STOPPED = 5, 130  # what pytest ends with where every test was left out, and what Ctrl-C ends with


def crashes(seed: int) -> dict[str, Any]:
    """A hundred kills: their counts."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "counts.json"
        code = pytest("-s", str(HERE / "torture_crashes.py"), TORTURE_SEED=str(seed), TORTURE_LOG=str(log))
        found = json.loads(log.read_text()) if log.exists() else {"problems": ["it did not end"]}
    return {**found, "passed": code == 0 and not found["problems"], "ended": "seed" in found}


def hostile(seed: int, *, cases: int, log: Path, processes: str) -> dict[str, Any]:
    """A hundred thousand files: how many of each kind, and the tests that failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    shared = ["-n", processes, "--maxprocesses", "4"] if processes != "0" else []
    environment = {"DUO_HOSTILE_CASES": str(cases), "DUO_HOSTILE_LOG": str(log)}
    try:
        code = pytest(*shared, f"--hypothesis-seed={seed}", str(HERE / "hostile"), **environment)
    except KeyboardInterrupt:
        code = STOPPED
    return {**counted(log, cases=cases), "ended": code in (0, 1, NOTHING_LEFT), "seed": seed}


def counted(log: Path, *, cases: int) -> dict[str, Any]:
    """What the log says of the code that its last line is of."""
    rows = read_jsonl(log, appended=True)
    last = {row["test"]: row for row in rows if rows and (row["code"], row["wanted"]) == (rows[-1]["code"], cases)}
    tried: Counter[str] = Counter()
    for row in last.values():
        tried.update(row["cases"])
    failed = sorted(name for name, row in last.items() if not row["passed"])
    return {
        "passed": not failed,
        "cases": sum(tried.values()),
        "of": dict(sorted(tried.items())),
        "tests": len(last),
        "failed": failed,
        "seconds": round(sum(row["seconds"] for row in last.values())),
    }


def pytest(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=HERE.parent, env={**os.environ, **environment}, check=False).returncode


def _where() -> dict[str, Any]:
    """The commit, and the machine without its name."""
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    state = [*git, "status", "--porcelain", "--", "../src", "."]
    changed = subprocess.run(state, capture_output=True, text=True, check=False).stdout
    return {
        "commit": commit + (" and changes" if changed else ""),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help="crashes, hostile; both where none is named")
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs" / "results" / "torture.json")
    parser.add_argument("--log", type=Path, default=HERE.parent / "runs" / "torture" / "hostile.jsonl")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--processes", default="auto", help="for the hostile files; 0: this one")
    parser.add_argument(
        "--seed", type=int, default=int(os.environ.get("TORTURE_SEED", random.SystemRandom().randrange(10**6)))
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part is called {min(unknown)!r}; there are {' and '.join(PARTS)}")
    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    for part in given.parts:
        where = _where()
        found = (
            crashes(given.seed)
            if part == "crashes"
            else hostile(given.seed, cases=given.cases, log=given.log, processes=given.processes)
        )
        results[part] = {**found, **where}
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(dict(sorted(results.items())), indent=2, ensure_ascii=False) + "\n")
    return 0 if all(results[part]["passed"] and results[part]["ended"] for part in given.parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
