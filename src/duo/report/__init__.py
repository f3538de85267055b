"""From a run folder's records to `report.html`, `report.json` and the model card `README.md`. No torch.

The same records give the same bytes; what a run cost is in the section "cost" of `report.json` and of the page alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duo.report import card, page
from duo.report.records import RunRecords, read_run
from duo.report.wording import verdict
from duo.rundir import write_bytes, write_json

__all__ = ["SCHEMA", "build_report", "read_run", "verdict", "write_report"]

SCHEMA = 1


def write_report(run: Path, *, uncensored: bool = False) -> Path:
    """Write the three files of the report into the run folder `run` and return the path of `report.html`.

    `uncensored` embeds the unsafe originals in the page, each behind a click.

    Raises:
        UserError: a record is missing or broken; nothing is written then.
    """
    records = read_run(run)
    report = build_report(records)
    readme = card.render(records)
    html = page.render(records, uncensored=uncensored)
    write_json(run / "report.json", report)
    write_bytes(run / "README.md", readme.encode())
    write_bytes(run / "report.html", html.encode())
    return run / "report.html"


def build_report(records: RunRecords) -> dict[str, Any]:
    """The contents of `report.json`."""
    return {
        "schema": SCHEMA,
        **records.sections,
        "cost": {**records.cost, "machine": records.machine},
        "config": records.recipe,
        "versions": records.versions,
    }
