"""From a run folder's records to `report.html`, `report.json` and the model card `README.md`. No torch.

The same records give the same bytes; what a run cost is in the sections "cost" and "hardening" of `report.json`, and of
the page, alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duo.errors import UserError
from duo.fields import as_table
from duo.purged import PURGED
from duo.report import card, page
from duo.report.plain_text import json_text
from duo.report.records import RunRecords, read_run
from duo.report.warnings import cautions
from duo.report.wording import SCHEMA, verdict
from duo.rundir import write_bytes

__all__ = ["SCHEMA", "build_report", "read_run", "verdict", "write_report"]

FIGURE = "figure4.svg"  # as a bench names it
UNCENSORED = "report-uncensored.html"  # apart, so that the page that is passed on never has the originals


def write_report(run: str | Path, *, uncensored: bool = False, tradeoff: Path | None = None) -> Path:
    """Write the three files of the report into the run folder `run` and return the path of the page.

    `uncensored` also writes, and returns, `report-uncensored.html`, which has the unsafe originals behind clicks.
    `tradeoff` is the figure of a bench: an SVG, a results folder, or the folder of a bench. It is copied to
    `tradeoff.svg` in the run folder, and is part of the page as long as it lies there.

    Raises:
        UserError: a record is missing or broken, or the figure is no plain SVG; nothing is written then.
    """
    run = Path(run)
    if uncensored and (run / PURGED).exists():
        raise UserError(f"{run}: its unsafe images were removed by `duo purge`; leave out --uncensored")
    records = read_run(run)
    report = build_report(records)
    readme = card.render(records)
    figure = run / page.TRADEOFF if tradeoff is None else _figure_of(tradeoff)
    html = page.render(records, uncensored=False, tradeoff=figure)
    if tradeoff is not None:
        write_bytes(run / page.TRADEOFF, figure.read_bytes())
    write_bytes(run / "report.json", json_text(report).encode())
    write_bytes(run / "README.md", readme.encode())
    write_bytes(run / "report.html", html.encode())
    if not uncensored:
        return run / "report.html"
    write_bytes(run / UNCENSORED, page.render(records, uncensored=True, tradeoff=figure).encode())
    return run / UNCENSORED


def _figure_of(path: Path) -> Path:
    """The SVG that `path` is, or that lies in the folder `path`."""
    places = (path / FIGURE, path / "results" / FIGURE) if path.is_dir() else (path,)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        where = f"{path} has no {FIGURE}" if path.is_dir() else f"{path} is no file"
        raise UserError(f"{where}; name the SVG of a bench's trade-off, or a folder that holds {FIGURE}")
    return file


def build_report(records: RunRecords) -> dict[str, Any]:
    """The contents of `report.json`."""
    return {
        "schema": SCHEMA,
        **records.sections,
        "warnings": [one.table() for one in cautions(records.scores, erasure=records.kind)],
        **({} if records.searched is None else {"searched": as_table(records.searched)}),
        **({"hardening": records.hardening.table()} if records.hardening else {}),
        "cost": {**records.cost, "machine": records.machine},
        "config": records.recipe,
        "versions": records.versions,
    }
