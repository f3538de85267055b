"""What benchmarks put into pages of docs/: it stands between two marks, which name the target that made it."""

from __future__ import annotations

from pathlib import Path

from duo.rundir import write_bytes


def put(page: Path, made: str, *, by: str) -> None:
    """Replace what stands in `page` between the marks of `by`, a target of the Makefile."""
    write_bytes(page, put_between(page.read_text(), made, by=by).encode())


def put_between(text: str, made: str, *, by: str) -> str:
    """`text` with `made` between the two marks of `by`, which it must have."""
    begin, end = f"<!-- made by make {by} -->", f"<!-- end of what make {by} made -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{made}\n{end}{after}"
