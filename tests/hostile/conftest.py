"""Hostile files: the short form in every run of the tests, the long one with DUO_HOSTILE_CASES=100000.

With DUO_HOSTILE_LOG=FILE each test adds a line to that file when it ends, and one that has passed with as many cases
and the same code is not made again: so the long form may be stopped, and gone on with by the same command.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))  # its made-up runs are what is damaged here

import ordeal

from duo.rundir import append_jsonl, read_jsonl

LOG = os.environ.get("DUO_HOSTILE_LOG")
SOURCES = (Path(__file__).parent, Path(__file__).parents[2] / "src" / "duo")
_failed = pytest.StashKey[bool]()


@lru_cache
def code() -> str:
    """What has been put to the test, and by what: a digest of duo's files and of these."""
    every = sorted(path for folder in SOURCES for path in folder.rglob("*") if path.suffix in (".py", ".toml"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in every)).hexdigest()[:16]


def passed() -> dict[str, Counter[str]]:
    """The cases of each test that the log says has passed, with this code and as many cases."""
    found = {}
    for row in read_jsonl(Path(LOG), appended=True) if LOG else ():
        if row["passed"] and (row["code"], row["wanted"]) == (code(), ordeal.WANTED):
            found[row["test"]] = Counter(row["cases"])
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = passed()
    if done := [item for item in items if item.nodeid in known]:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in known]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed  # type: ignore[attr-defined]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before, began = Counter(ordeal.tried), time.monotonic()
    result = yield
    if LOG:
        row = {
            "test": item.nodeid,
            "passed": not item.stash[_failed],
            "cases": ordeal.tried - before,
            "seconds": round(time.monotonic() - began, 1),
            "wanted": ordeal.WANTED,
            "code": code(),
        }
        append_jsonl(Path(LOG), row)
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Gather the counts of a process of pytest-xdist."""
    ordeal.tried.update(getattr(node, "workeroutput", {}).get("hostile", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["hostile"] = dict(ordeal.tried)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tried = sum(passed().values(), Counter()) if LOG else ordeal.tried
    total = sum(tried.values())
    if not total:
        return
    terminalreporter.section("hostile input")
    for name, count in sorted(tried.items()):
        terminalreporter.write_line(f"{count:8,} {name}")
    terminalreporter.write_line(f"{total:8,} cases tried")
