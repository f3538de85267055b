"""Hostile files: the short form in every run of the tests, the long one with DUO_HOSTILE_CASES=100000."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # its made-up runs are what is damaged here

import ordeal


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Gather the counts of a process of pytest-xdist."""
    ordeal.tried.update(getattr(node, "workeroutput", {}).get("hostile", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["hostile"] = dict(ordeal.tried)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    total = sum(ordeal.tried.values())
    if not total:
        return
    terminalreporter.section("hostile input")
    for name, count in sorted(ordeal.tried.items()):
        terminalreporter.write_line(f"{count:8,} {name}")
    terminalreporter.write_line(f"{total:8,} cases tried")
