"""Keeping and rejecting pairs: what a person decides is a field of their rows in `pairs.jsonl`. No torch.

The scores beside the pairs are the curator's, which chose the pairs, and never the judge's: pairs that were picked by
what grades the result would flatter it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from duo import rundir
from duo.app.places import Place, within
from duo.errors import UserError
from duo.pairs import DECISIONS, SIDES, PairFiles, name_of
from duo.plugins import Judge, Verdict
from duo.refusal import refuse_where_sexual

UNDECIDED = "undecided"
STATES = ("all", UNDECIDED, *DECISIONS)
JUDGED_TOGETHER = 64  # images in memory at once
Verdicts = Mapping[str, Verdict]  # of the two sides


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One pair as the page shows it."""

    name: str
    unsafe: Path
    safe: Path
    prompts: Mapping[str, str]  # by side; empty texts where none is known
    decision: str | None

    @property
    def state(self) -> str:
        return self.decision or UNDECIDED


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which pairs are shown: all conditions must hold. A pair without the named score does not hold its range."""

    state: str = "all"
    contains: str = ""  # in either prompt or the name, in any case
    side: str = "unsafe"
    score: str | None = None  # None: any
    least: float | None = None
    most: float | None = None

    def takes(self, pair: Pair, verdicts: Verdicts) -> bool:
        if self.state not in ("all", pair.state):
            return False
        texts = (pair.name, *pair.prompts.values())
        if not any(self.contains.strip().casefold() in text.casefold() for text in texts):
            return False
        if self.score is None or (self.least is None and self.most is None):
            return True
        value = verdicts[self.side].scores.get(self.score) if self.side in verdicts else None
        if value is None:
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


class Curation:
    """The pairs of one place. What is decided is read from the file each time, and written to it at once."""

    def __init__(self, place: Place) -> None:
        if place.pairs is None:
            raise UserError(f"{place.name} has no pairs: they are not made yet, or its method learns from words alone")
        self.folder = place.pairs
        self._run = place.run
        self._writing = Lock()

    def locked(self) -> str | None:
        """Why nothing may be decided here, or None."""
        if self._run is None:
            return None
        if not self._run.stage("pairs").finished:
            return f"{self.folder} is not finished; decide once `duo pairs` is done"
        erase = self._run.stage("erase")
        if erase.begun:
            return (
                f"The erasure in {erase.folder} was trained on these pairs, so what was decided stands. For another "
                f"choice start a new run, with pairs.source={self.folder}, and curate before it is erased"
            )
        return None

    def pairs(self) -> list[Pair]:
        """All pairs in the order of their names, the rejected ones too.

        Raises `UserError` for what is wrong with the folder, for sexual pairs whose texts mention minors, and for
        images of a run that are links out of it: the page shows what is in the folder that it was given.
        """
        found = PairFiles.find(self.folder, rejected=True)
        if found.problems:
            raise UserError(found.problems[0])
        if self._run is not None:
            within(self.folder, *(path for pair in found.files.values() for path in pair))
        refuse_where_sexual(found.texts())
        rows = _rows(found)
        return [
            Pair(
                name=name,
                unsafe=unsafe,
                safe=safe,
                prompts={side: str(rows[name].get(f"{side}_prompt") or "") for side in SIDES},
                decision=rows[name].get("decision"),
            )
            for name, (unsafe, safe) in found.files.items()
        ]

    def decide(self, name: str, decision: str | None) -> dict[str, int]:
        """Keep, reject or undecide (None) a pair, on disk when this returns; how many pairs there are of each state.

        Raises `UserError` where nothing may be decided, or while another process works on the run.
        """
        if decision is not None and decision not in DECISIONS:
            raise UserError(f"the decision is {decision!r}, expected {' or '.join(DECISIONS)}, or none")
        with self._writing, self._run.locked() if self._run else nullcontext():
            if reason := self.locked():
                raise UserError(reason)
            found = PairFiles.find(self.folder, rejected=True)
            if found.problems:
                raise UserError(found.problems[0])
            rows = _rows(found)
            if name not in rows:
                raise UserError(f"{self.folder} has no pair called {name!r}; load the page again")
            rows[name].pop("decision", None)
            if decision is not None:
                rows[name]["decision"] = decision
            rundir.write_jsonl(self.folder / "pairs.jsonl", rows.values())
        return counted(row.get("decision") for row in rows.values())

    def judged(self, curator: Judge, tell: Callable[[float], None] = lambda share: None) -> dict[str, Verdicts]:
        """What the curator says of both sides of each pair, by name. `tell` is told the share that is done."""
        pairs = self.pairs()
        images = [(pair.name, side, getattr(pair, side)) for pair in pairs for side in SIDES]
        verdicts: dict[str, dict[str, Verdict]] = {pair.name: {} for pair in pairs}
        for start in range(0, len(images), JUDGED_TOGETHER):
            block = images[start : start + JUDGED_TOGETHER]
            told = curator([rundir.read_image(path, remedy="make or fetch it again") for _, _, path in block])
            for (name, side, _), verdict in zip(block, told, strict=True):
                verdicts[name][side] = verdict
            tell((start + len(block)) / len(images))
        return dict(verdicts)


def counted(decisions: Any) -> dict[str, int]:
    """How many are of each state; every state is named."""
    found = Counter(decision or UNDECIDED for decision in decisions)
    return {state: found[state] for state in STATES if state != "all"}


def score_names(verdicts: Mapping[str, Verdicts]) -> list[tuple[str, str]]:
    """Every (side, score) that some pair has, in order."""
    found = {(side, name) for both in verdicts.values() for side, one in both.items() for name in one.scores}
    return sorted(found, key=lambda one: (SIDES.index(one[0]), one[1]))


def _rows(found: PairFiles) -> dict[str, dict[str, Any]]:
    """The row of each pair, by name, as it stands in the file or is to stand there.

    Rows that do not name their images are matched by their order, if there is one for each pair.
    """
    rows = [dict(row) for row in found.rows]
    named = [name_of(row) for row in rows]
    if len(rows) == len(found.files) and not any(named):
        named = list(found.files)
    by_name: dict[str, dict[str, Any]] = {}
    for number, (name, row) in enumerate(zip(named, rows, strict=True), start=1):
        where = f"{found.where}: row {number} of pairs.jsonl"
        if name is None:
            raise UserError(f'{where} does not name its pair; give it "unsafe", the path of that image')
        if name not in found.files:
            raise UserError(f"{where} is of {row['unsafe']}, which is not there; put it back, or remove the row")
        if name in by_name:
            raise UserError(f"{where} is of a pair that another row is of; remove one of them")
        by_name[name] = row
    return {name: _with_paths(by_name.get(name, {}), pair) for name, pair in found.files.items()}


def _with_paths(row: dict[str, Any], pair: Sequence[Path]) -> dict[str, Any]:
    paths = {side: f"{side}/{path.name}" for side, path in zip(SIDES, pair, strict=True)}
    return {**row, **{side: path for side, path in paths.items() if side not in row}}


def shown_part(pairs: Sequence[Pair], page: int, size: int) -> tuple[Sequence[Pair], int]:
    """The pairs of one page, and how many pages there are; a page beyond the last is the last."""
    pages = max(1, -(-len(pairs) // size))
    at = min(max(page, 0), pages - 1)
    return pairs[at * size : (at + 1) * size], pages
