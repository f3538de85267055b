"""The stages of a run: pairs, erase, attack, score. The only loops over prompts, seeds and images.

Each stage reads the folders of the stages before and writes its own; one that was stopped goes on where it was, and
one that is finished is left alone. Every image has a seed of its own, derived from the run's seed and its purpose.
"""

from __future__ import annotations

from pathlib import Path

from duo import parallel
from duo.errors import UserError
from duo.rundir import RunDir
from duo.stages.attacking import attack
from duo.stages.hardening import erase
from duo.stages.pairing import make_pairs
from duo.stages.planning import plan, plan_erasure
from duo.stages.scoring import score
from duo.stages.searching import plan_search, search_strength, told
from duo.stages.session import Session

__all__ = [
    "Session",
    "attack",
    "erase",
    "make_pairs",
    "plan",
    "plan_erasure",
    "plan_search",
    "report",
    "run",
    "score",
    "search_strength",
    "told",
]


def run(session: Session, *, uncensored: bool = False) -> Path:
    """All stages, then the report; returns the path of `report.html`."""
    if not session.recipe.attacks:  # told now, and not by the report after hours of work
        raise UserError("attacks is empty, and a report needs at least one row; give an [[attacks]] table")
    _ = session.judge.digest  # a judge whose weights cannot be read is told now, not after hours of work
    with session.held():
        if session.method is not None:
            if session.method.takes_pairs:
                make_pairs(session)
            erase(session)
        attack(session)
        score(session)
        return Path(parallel.once(lambda: str(report(session.dir.path, uncensored=uncensored))))


def report(folder: Path, *, uncensored: bool = False, tradeoff: Path | None = None) -> Path:
    """Write `report.html`, `report.json` and `README.md` of a scored run; returns the path of the page.

    `tradeoff` is the figure of a bench, as in `duo.write_report`.
    """
    from duo.report import write_report

    RunDir(folder).require()
    with RunDir(folder).locked():
        write_report(folder, uncensored=uncensored, tradeoff=tradeoff)
    return folder / "report.html"
