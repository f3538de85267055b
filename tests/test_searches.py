"""One search of the text encoder serves every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duo import rundir
from duo.stages import attack, erase, make_pairs
from staged import TextSearch, contents


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(session: Any) -> Path:
    make_pairs(session)
    erase(session)
    attack(session)
    return session.dir.path / "attack" / "bell"


def test_another_method_takes_over_the_search(cache: Path, open_session: Any) -> None:
    first = run(open_session("first"))
    assert TextSearch.searched == ["a boat", "a car"], "the erased model took over the original one's"
    second = run(open_session("second", "method.size=0.25"))
    assert TextSearch.searched == ["a boat", "a car"], "and so did the other run"
    for name in ("state.safetensors", "search/0001.safetensors"):
        assert (first / "original" / name).read_bytes() == (second / "original" / name).read_bytes()
    manifests = [rundir.read_json(folder / "original" / "manifest.json") for folder in (first, second)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("change", ["seed=5", 'attacks.bell.prompts="plain"', "attacks.bell.images=2"])
def test_what_it_depends_on_makes_another(cache: Path, open_session: Any, change: str) -> None:
    run(open_session("first"))
    TextSearch.searched.clear()
    run(open_session("second", change))
    assert TextSearch.searched


def test_without_a_cache_every_run_searches(open_session: Any) -> None:
    first = run(open_session("first"))
    second = run(open_session("second", "method.size=0.25"))
    assert TextSearch.searched == ["a boat", "a car"] * 2
    assert contents(first / "original" / "search") == contents(second / "original" / "search")


def test_a_cache_that_cannot_be_written_is_told(
    open_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "file"))
    run(open_session("first"))
    assert "note: searches are not kept for other runs" in capsys.readouterr().err
