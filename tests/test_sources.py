"""The hub client where nobody answers: one question, no waiting. No test reaches for the network."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from duo.clip import find_clip
from duo.errors import UserError
from duo.models import load_family
from duo.sources import hub_file


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub at a closed port of this machine, and an empty cache, whose folder it is. Nobody may sleep."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def sleep(seconds: float) -> None:
        raise AssertionError(f"the client waits {seconds} s to ask again")

    monkeypatch.setattr(time, "sleep", sleep)
    return tmp_path


def test_a_hub_that_does_not_answer_is_told_at_once_with_the_ways_out(dead_hub: Path) -> None:
    todo = "or run `hf download some/body` where there is a network, and set HF_HUB_OFFLINE=1"
    reason = r"\(no answer from http://127\.0\.0\.1:\d+: .*\)"
    with pytest.raises(UserError, match=rf"^'some/body' is .*{reason}; give a local folder by --model, {todo}$"):
        load_family("some/body")
    with pytest.raises(UserError, match=rf"^judge x: 'some/body' is .*{reason}; give the judge's .* folder, {todo}$"):
        find_clip("some/body", "judge x")


def test_what_is_in_the_cache_needs_no_hub(dead_hub: Path) -> None:
    folder, commit = dead_hub / "models--some--body", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    wanted = folder / "snapshots" / commit / "config.json"
    wanted.parent.mkdir(parents=True)
    wanted.write_text("{}")
    assert hub_file("some/body", "config.json", kind="a model", give="") == wanted


def test_offline_names_the_setting_and_the_file(dead_hub: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"\(HF_HUB_OFFLINE is set, and its model_index\.json is not in the cache\)"):
        load_family("some/body")
