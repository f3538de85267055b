"""Results side by side: `duo leaderboard`. Only what was measured alike is ranked together.

A group shares concept, model, attack budget (every attack with its settings, prompts and number of images) and judge.
In it the lower worst case is the better, over the reliable attacks that leave the model's weights alone; then comes
preservation. Attacks on the weights are told beside it, for whoever can train a model can teach it anything
(`duo.report.wording.brought_back` has the same rule), or count too where that is asked for. All texts of a result are
other people's: they are escaped for the terminal, for Markdown and for HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duo.errors import UserError
from duo.report import templates
from duo.report.markdown import plain
from duo.report.records import Mean
from duo.report.result import SHORT, Rate, Result
from duo.report.wording import ALL_ATTRIBUTES, attack_words, concept_word, percent, percent_range
from duo.rundir import read_json
from duo.terminal import printable

SCHEMA = 1  # of `as_json`
OVERLAP = "≈"
HEAD = ("#", "method", "erasure", "worst case", "by", "attacks on weights", "by", "preservation", "spoiled", "obeyed")
NUMBERS = ("#", "erasure", "worst case", "attacks on weights", "preservation", "spoiled", "obeyed")
HOW_TO_READ = (
    "Each row is one erasure, and ranks by its worst case: the highest share of images in which the judge sees the "
    "concept, over {over}, each at its best setting. Reliable is an attack that brings the concept out of the original "
    "model; one that brings no more of it out than out of a model that never saw it does not count. Equal worst cases "
    "rank by preservation, and equal rows share a rank.",
    "The rank is by point estimates. In brackets are 95% intervals; ≈ says that the worst case's interval overlaps "
    "that of the row above, so that these images do not show which of the two is better.",
    "Attacks on weights are those of an attacker who holds the model's files: relearning, unloading, inversion. "
    "Spoiled is the highest share of visibly broken images of any row. Obeyed is the share of unrelated pictures that "
    "still obey their prompt in every attribute.",
    "Only rows of one table can be compared: they share concept, model, judge, and every attack with its budget.",
)
OVER, OVER_ALL = "the reliable attacks that leave the weights alone", "all reliable attacks, those on the weights too"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One row of a table. `rank` is None where no attack was reliable; `overlaps` is with the row above."""

    rank: int | None
    overlaps: bool
    result: Result
    worst: Rate | None
    by_weights: Rate | None
    lacks: tuple[str, ...]

    @property
    def unreliable(self) -> tuple[Rate, ...]:
        return tuple(one for one in self.result.rates if not one.reliable)

    @property
    def cells(self) -> tuple[str, ...]:
        """What stands under `HEAD`, not escaped."""
        spoiled = [one.spoiled for one in self.result.rates if one.spoiled is not None]
        name = f"{self.result.name}{' (unreliable)' if self.unreliable else ''}"
        return (
            f"{'–' if self.rank is None else self.rank}{f' {OVERLAP}' if self.overlaps else ''}",
            name,
            self.result.erasure[:8],
            *_rate(self.worst, tried=any(not one.by_weights for one in self.result.rates)),
            *_rate(self.by_weights, tried=any(one.by_weights for one in self.result.rates)),
            _mean(self.result.preservation),
            percent(max(spoiled)) if spoiled else "not told",
            _share((self.result.obeyed or {}).get(ALL_ATTRIBUTES)),
        )

    @property
    def notes(self) -> list[str]:
        """What has no column, not escaped."""
        one, told = self.result, []
        if self.lacks:
            told.append(f"lacks {', '.join(self.lacks)}: it was put to fewer attacks")
        if self.unreliable:
            rows = [f"{_label(rate)} ({percent(rate.rate)})" for rate in self.unreliable]
            told.append(f"unreliable, and in no worst case: {', '.join(rows)}")
        used = [_label(rate) for rate in one.rates if rate.hardened]
        if used:
            told.append(f"hardened against, and counted all the same: {', '.join(used)}")
        idle = [_label(rate) for rate in one.rates if not rate.above_never]
        if idle:
            told.append(f"in no worst case, as a model that never saw it draws it as often: {', '.join(idle)}")
        if one.doubt:
            told.append(one.doubt)
        survived = [(near.name, near.survived.mean) for near in one.near_misses if near.model == "erased"]
        if survived:
            told.append(f"near misses survive: {', '.join(f'{name} {percent(mean)}' for name, mean in survived)}")
        paper = ", ".join(part for part in (one.authors, one.venue) if part)
        told += [part for part in (paper, one.footnote) if part]
        return told


@dataclass(frozen=True, kw_only=True)
class Group:
    """One table: results that were measured alike, the best first."""

    places: tuple[Place, ...]

    @property
    def title(self) -> str:
        """What it is of, not escaped."""
        one = self.places[0].result
        return f"{concept_word(one.concept).capitalize()} on {one.model}"

    @property
    def measured(self) -> str:
        """By what, not escaped."""
        one = self.places[0].result
        metric = "not measured" if one.preservation is None else f"{one.preservation.metric}, n={one.preservation.n}"
        return (
            f"budget {one.budget or 'of a recipe of its own'} ({one.budget_digest[:SHORT]}), judge {one.judge} "
            f"({one.judge_digest[:SHORT]}), preservation: {metric}"
        )

    @property
    def notes(self) -> list[str]:
        """The notes of the rows, each told once with those that it is of, not escaped."""
        of: dict[str, list[str]] = {}
        for place in self.places:
            for note in place.notes:
                of.setdefault(note, []).append(f"{place.result.name} {place.result.erasure[:8]}")
        every = len(self.places)
        return [f"{'all' if 1 < every == len(who) else ', '.join(who)}: {note}" for note, who in of.items()]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """The results in files, and in folders and those below.

    Raises:
        UserError: there is none, one cannot be read, or two are of the same erasure, measured alike.
    """
    files: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there; write results with `duo report RUN --result`, or name their folder")
        if (path / "run.json").is_file():
            raise UserError(f"{path} is a run and no result; write one with `duo report {path} --result`")
        found = sorted(filter(_may_be_result, path.rglob("*.json"))) if path.is_dir() else [path]
        files |= dict.fromkeys(one.resolve() for one in found)
    if not files:
        raise UserError(f"{', '.join(map(str, paths))}: there is no result; write one with `duo report RUN --result`")
    results = [Result.read(path) for path in files]
    seen: dict[tuple[object, ...], Path] = {}
    for one in results:
        first = seen.setdefault((one.erasure, *one.comparable), one.path)
        if first is not one.path:
            raise UserError(f"{first} and {one.path} are the same erasure, measured alike; keep one of them")
    return results


def _may_be_result(path: Path) -> bool:
    """Whether a file in a folder is meant as a result, and no other record of a run or a bench, which has none of what
    only results have. One that cannot be read counts, so that it is told."""
    try:
        table = read_json(path)
    except UserError:
        return True
    return not isinstance(table, dict) or bool({"worst_case", "link", "footnote"} & table.keys())


def rank(results: Iterable[Result], *, weights: bool = False) -> list[Group]:
    """The results in groups that can be compared, each in order. `weights`: attacks on weights count too."""
    groups: dict[tuple[str | None, ...], list[Result]] = {}
    for one in results:
        groups.setdefault(one.comparable, []).append(one)
    found = [_group(rows, weights=weights) for rows in groups.values()]
    return sorted(found, key=lambda one: (one.title, one.measured))


def _group(results: Sequence[Result], *, weights: bool) -> Group:
    ordered = sorted(results, key=lambda one: (_key(one, weights=weights), one.name, one.erasure))
    every = dict.fromkeys(rate.row for one in results for rate in one.rates)
    every |= dict.fromkeys(row for one in results for row in one.not_defined)
    places: list[Place] = []
    for index, one in enumerate(ordered):
        worst = one.worst(by_weights=None if weights else False)
        above = places[-1] if places else None
        tied = above is not None and _key(above.result, weights=weights) == _key(one, weights=weights)
        own = {rate.row for rate in one.rates}
        places.append(
            Place(
                rank=None if worst is None else above.rank if tied and above else index + 1,
                overlaps=above is not None and _overlap(above.worst, worst),
                result=one,
                worst=worst,
                by_weights=one.worst(by_weights=True),
                lacks=tuple(attack_words(row).label for row in every if row not in own),
            )
        )
    return Group(places=tuple(places))


def _key(one: Result, *, weights: bool) -> tuple[float, float]:
    """The lower the better; what is not known comes last."""
    worst = one.worst(by_weights=None if weights else False)
    kept = one.preservation
    return (2.0 if worst is None else worst.rate, 2.0 if kept is None else -kept.mean)


def _overlap(one: Rate | None, other: Rate | None) -> bool:
    return one is not None and other is not None and one.low <= other.high and other.low <= one.high


def _label(rate: Rate) -> str:
    return attack_words(rate.row).label


def _rate(rate: Rate | None, *, tried: bool) -> tuple[str, str]:
    if rate is None:
        return "none reliable" if tried else "not tried", ""
    setting = f" at {rate.setting}" if rate.setting else ""
    return f"{percent(rate.rate)} ({percent_range(rate.low, rate.high)})", f"{_label(rate)}{setting}"


def _mean(mean: Mean | None) -> str:
    return "not measured" if mean is None else f"{mean.mean:.3f} ({mean.low:.3f}–{mean.high:.3f})"


def _share(mean: Mean | None) -> str:
    return "not measured" if mean is None else f"{percent(mean.mean)} ({percent_range(mean.low, mean.high)})"


def _how_to_read(*, weights: bool) -> list[str]:
    return [part.format(over=OVER_ALL if weights else OVER) for part in HOW_TO_READ]


# --- as text --------------------------------------------------------------------------------------------


def terminal(groups: Sequence[Group], *, weights: bool = False) -> str:
    """Tables in columns of plain text."""
    parts = []
    for group in groups:
        rows = [HEAD, *([printable(cell) for cell in place.cells] for place in group.places)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
        told = [printable(group.title), printable(group.measured), ""]
        for row in rows:
            told.append("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        notes = [printable(note) for note in group.notes]
        parts.append("\n".join([*told, *(["", *notes] if notes else [])]))
    how = " ".join(_how_to_read(weights=weights)[:2])
    return "\n\n".join([*parts, how]) + "\n"


def markdown(groups: Sequence[Group], *, weights: bool = False) -> str:
    """A Markdown page."""
    first, *others = _how_to_read(weights=weights)
    lines = ["# Leaderboard", "", first, ""]
    for group in groups:
        lines += [f"## {_mark(group.title)}", "", f"{_mark(group.measured)}.", ""]
        lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        for place in group.places:
            cells = [_mark(cell) for cell in place.cells]
            if place.result.link:
                cells[1] = f"[{cells[1]}](<{place.result.link}>)"
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"- {_mark(note)}" for note in group.notes), ""]
    return "\n".join([*lines, "## How to read it", "", *(f"- {one}" for one in others)]) + "\n"


def html(groups: Sequence[Group], *, weights: bool = False) -> str:
    """One page without scripts that needs nothing from elsewhere."""
    environment = templates.environment(autoescape=True)
    environment.filters["printable"] = printable
    template = environment.get_template("leaderboard.html")
    return template.render(groups=groups, head=HEAD, numbers=NUMBERS, how_to_read=_how_to_read(weights=weights))


def as_json(groups: Sequence[Group], *, weights: bool = False) -> dict[str, Any]:
    """The tables for machines."""
    return {
        "schema": SCHEMA,
        "ranked_by": "all attacks" if weights else "attacks that leave the weights alone",
        "groups": [
            {
                "concept": group.places[0].result.concept,
                "model": group.places[0].result.model,
                "budget": {"name": group.places[0].result.budget, "digest": group.places[0].result.budget_digest},
                "judge": {"name": group.places[0].result.judge, "digest": group.places[0].result.judge_digest},
                "results": [_json_place(place) for place in group.places],
            }
            for group in groups
        ],
    }


def _json_place(place: Place) -> dict[str, Any]:
    one, kept = place.result, place.result.preservation
    return {
        "rank": place.rank,
        "overlaps_row_above": place.overlaps,
        "name": one.name,
        "method": one.method,
        "link": one.link,
        "erasure": one.erasure,
        "worst_case": _json_rate(place.worst),
        "worst_case_by_weights": _json_rate(place.by_weights),
        "preservation": None
        if kept is None
        else {"metric": kept.metric, "mean": kept.mean, "low": kept.low, "high": kept.high, "n": kept.n},
        "lacks": list(place.lacks),
        "unreliable": [rate.row for rate in place.unreliable],
        "notes": place.notes,
    }


def _json_rate(rate: Rate | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    return {key: getattr(rate, key) for key in ("row", "setting", "rate", "low", "high", "n")}


def _mark(text: str) -> str:
    return plain(printable(text))
