"""What benchmarks put into pages of docs/: it stands between two marks, which name the target that made it."""

from __future__ import annotations

from pathlib import Path

from duo.rundir import write_bytes


def put(page: Path, made: str, *, by: str) -> None:
    """Replace what stands in `page` between the marks of `by`, a target of the Makefile."""
    write_bytes(page, put_between(page.read_text(), made, by=by).encode())


def put_between(text: str, made: str, *, by: str) -> str:
    """`text` with `made` between the two marks of `by`, each of which it must have once, and in this order."""
    begin, end = f"<!-- made by make {by} -->", f"<!-- end of what make {by} made -->"
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise SystemExit(f"the page has {text.count(mark)} lines {mark!r}, expected one")
    before, rest = text.split(begin)
    if end not in rest:
        raise SystemExit(f"the page has the line {end!r} before {begin!r}, expected it after")
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
