"""The short form of the crash tests: a few kills, stops and full disks. `make torture` runs the long one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_run_that_is_killed_stopped_or_without_room_ends_with_the_same_bytes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """In a process of its own, which forks: this one may have threads."""
    wanted = ("--kills", "3", "--stops", "2", "--full", "2", "--only", "short", "--seed", "3")
    done = subprocess.run(
        [sys.executable, str(HERE / "crashes.py"), str(tmp_path), str(tiny_folder), *wanted],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "crashes: seed 3\n" in done.stdout
    told = re.search(r"(\d+) kills survived, (\d+) stops and (\d+) full disks .* (\d+) files compared", done.stdout)
    assert told is not None
    kills, stops, full, files = map(int, told.groups())
    assert (kills, stops, full) == (3, 2, 2) and "1 × SIGINT" in done.stdout and "1 × SIGTERM" in done.stdout
    assert files > 60
    assert "looked after: 0 lost, made again or different" in done.stdout
