"""`docs/licences.md` is of what is installed here, and nothing in the core is under a licence that would bind duo."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs/licences.md").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
AGAIN = "write it again with `python benchmarks/licences.py`"


def rows(heading: str) -> dict[str, tuple[str, str]]:
    """Package → (version, licence) of one section."""
    (section,) = (part for part in PAGE.split("\n## ") if part.startswith(heading))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    return {name: (version, licence) for name, version, licence, _ in cells[1:]}


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def test_every_requirement_has_a_row() -> None:
    assert {name_of(one) for one in PROJECT["dependencies"]} <= rows("The core").keys(), AGAIN
    for extra, needed in PROJECT["optional-dependencies"].items():
        assert {name_of(one) for one in needed} <= rows(f"Extra `{extra}`").keys() | rows("The core").keys(), AGAIN


def test_the_versions_are_those_that_are_installed_with() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    pinned = {name_of(name): version for name, version in pinned.items()}
    for heading in ("The core", *(f"Extra `{extra}`" for extra in PROJECT["optional-dependencies"])):
        for name, (version, _) in rows(heading).items():
            if name in pinned:
                assert version.partition("+")[0] == pinned[name], AGAIN


@pytest.mark.parametrize("strong", [r"\bA?GPL", r"\bLGPL", "General Public", "not told", "Proprietary"])
def test_nothing_in_the_core_binds_what_links_to_it(strong: str) -> None:
    bound = {name: licence for name, (_, licence) in rows("The core").items() if re.search(strong, licence)}
    assert not bound


def test_what_does_is_told_and_stays_in_its_extra() -> None:
    assert "AGPL-3.0" in rows("Extra `nudenet`")["nudenet"][1]
    assert "nudenet (AGPL-3.0 in the wheel; its metadata say MIT)" in PAGE
