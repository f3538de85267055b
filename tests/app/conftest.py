"""Runs as the page is given them, of the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duo.app.places import Place
from duo.stages import erase, make_pairs


@pytest.fixture
def with_pairs(open_session: Any) -> Any:
    """A session whose pairs are made, and nothing more."""
    session = open_session()
    make_pairs(session)
    return session


@pytest.fixture
def erased(with_pairs: Any) -> Any:
    """A session whose erasure is finished."""
    erase(with_pairs)
    return with_pairs


@pytest.fixture
def place(with_pairs: Any) -> Place:
    return Place.at(with_pairs.dir.path)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Three pairs that belong to no run."""
    from PIL import Image

    for side, colour in (("unsafe", 200), ("safe", 10)):
        (tmp_path / "own" / side).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), (colour, index, 0)).save(tmp_path / "own" / side / f"{index:04d}.png")
    return tmp_path / "own"
