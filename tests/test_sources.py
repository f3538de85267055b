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
from duo.sources import hub_file, hub_files, hub_path


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


def test_the_files_of_a_repository_are_asked_for_once_and_then_looked_for_in_the_cache(dead_hub: Path) -> None:
    todo = "or run `hf download some/set --repo-type dataset` where there is a network, and set HF_HUB_OFFLINE=1"
    asked = {"kind": "a data set", "give": "a file", "repo_type": "dataset"}
    with pytest.raises(UserError, match=rf"^'some/set' is .* \(no answer from http://127\.0\.0\.1:.*\); .*, {todo}$"):
        hub_files("some/set", **asked)
    folder, commit = dead_hub / "datasets--some--set", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name in ("b.csv", "within/a.csv"):
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert hub_files("some/set", **asked) == ["b.csv", "within/a.csv"]
    assert hub_file("some/set", "within/a.csv", **asked).read_text() == "x"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hub:a/b", ("a/b", "")),
        ("hub:a/b/", ("a/b", "")),
        ("hub:a/b/c/d.csv", ("a/b", "c/d.csv")),
        ("a/b", None),
        ("/hub:a/b", None),
    ],
)
def test_places_on_the_hub(text: str, wanted: tuple[str, str] | None) -> None:
    assert hub_path(text) == wanted


@pytest.mark.parametrize("text", ["hub:", "hub:a", "hub:a/", "hub:a//b", "hub:a/b/../c", "hub:a b/c", "hub:/a/b"])
def test_what_is_no_place_on_the_hub(text: str) -> None:
    with pytest.raises(UserError, match="is no place on the hub; expected hub:owner/name"):
        hub_path(text)
