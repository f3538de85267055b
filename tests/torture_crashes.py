"""The long form of the crash tests, by `make torture`: pytest finds it by its name alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KILLS, STOPS, FULL = 100, 16, 16


def test_a_hundred_kills(tiny_folder: Path, tmp_path: Path) -> None:
    """What it counts is printed (`pytest -s`). TORTURE_SEED in the environment makes the same moments again, and
    TORTURE_LOG names a file for the counts."""
    wanted = ["--kills", str(KILLS), "--stops", str(STOPS), "--full", str(FULL)]
    seed, log = os.environ.get("TORTURE_SEED"), os.environ.get("TORTURE_LOG")
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("crashes.py")),
            str(tmp_path),
            str(tiny_folder),
            *wanted,
            *(["--seed", seed] if seed else []),
            *(["--log", log] if log else []),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0
