"""The demo in small, on a machine that lets it speak with nobody: no network at run time, and no telemetry.

Run as a program, this file is the command line of duo in a process of which every word to another host is written down
and refused: `python test_closed_sockets.py NOTES run …`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = """
extends = "toybox-fire"
red_team = ""
attack_images = 1
pairs = {n = 2}
sampling = {num_inference_steps = 4}
method = {max_train_steps = 2, train_batch_size = 2, checkpointing_steps = 1, rank = 2}
score = {unrelated = 2, near_miss = 1, captions_n = 4, twins = 1}
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 2
"""
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
SWITCHES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY")


def duo(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The command line as a user has it: at home nothing is cached, and no switch turns anything off."""
    notes = folder / "notes.txt"
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"HOME": str(folder / "home"), "DUO_CACHE": "", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(notes), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
    )
    return done, notes.read_text() if notes.exists() else ""


def test_the_whole_job_asks_nobody(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done, asked = duo(tmp_path, "run", "recipe.toml", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/report.html").is_file()
    assert asked == ""


def test_only_a_hub_id_makes_it_ask(tmp_path: Path) -> None:
    """And so the one before would have seen it."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done, asked = duo(tmp_path, "run", "recipe.toml", "--model", "nobody/has-this", "--out", "run")
    assert done.returncode == 2
    assert "'nobody/has-this' is neither a folder nor a model that the hub client can get" in done.stderr
    assert asked.startswith("socket.")


def main(notes: str, *arguments: str) -> int:
    """The process itself."""

    def refuse(event: str, given: tuple[Any, ...]) -> None:
        local = event in ("socket.connect", "socket.sendto") and isinstance(given[1], str | bytes)  # a path of ours
        if event in EVENTS and not local:
            with Path(notes).open("a") as file:
                file.write(f"{event} {given[-1] if event == 'socket.connect' else given[0]}\n")
            raise ConnectionRefusedError("this process speaks with nobody")

    sys.addaudithook(refuse)
    from duo import cli

    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
