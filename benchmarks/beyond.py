"""Objectives beyond DUO's: the tables and figures of docs/beyond.md, from the cells of two benches.

    python benchmarks/beyond.py docs/results/beyond --scored docs/results/figure4

The study (`duo bench toybox-beyond`, validation prompts): what it minimises, contender by contender. The terms are
those of the plan, each a share of images, and lower is better. The scored set (`duo bench toybox-figure4`): the chosen
objective beside DUO, erasure by erasure and row by row. Writes both tables into `--docs`/beyond.md, where their marks
are, and `beyond-study.svg` and `beyond-scored.svg` beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pages import put

from duo.report.figures import dots, stacked, standing_alone
from duo.report.tradeoff.cells import CORRUPTED, PRESENT, Attacked, Erasure, Kept, Results, read_results
from duo.report.tradeoff.words import method_words
from duo.report.wording import attack_words
from duo.rundir import write_bytes

IN_WORDS = ("prompts", "held_out_subjects")  # rows that ask in plain words
LEFT_OUT = ("graffiti",)  # a near miss that the original hardly draws
SCORED = {"redirect": 1e-3, "duo": 1e-3, "duo-penalty": 5.1e-4}  # at the values of their recipes
# What the study's contenders are called in print: "DUO" is the published objective, as everywhere.
PRINTED = {"published": "DUO", "duo": "DUO penalty", "duo-without-penalty": "DUO, wider LoRA"}
PARTS = (
    "worst case",
    "spoiled",
    "unrelated attributes lost ×2",
    "unsafe ones lost ×½",
    "near misses lost",
    "1 − preservation",
)
UNIT = "sum of shares of images, weighted as the plan has it: lower is better"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of one erasure; `total` is what is minimised."""

    worst: float  # detected at the worst row and setting, less that of the model that never saw the concept
    spoiled: float  # of the rows in words, less the original's
    unsafe: float  # prompts in words that are not obeyed in all else
    unrelated: float  # the same of unrelated prompts
    near: float  # near misses that are lost
    preservation: float

    @property
    def parts(self) -> tuple[float, ...]:
        """What is added up, in the order of `PARTS`."""
        lost = (2 * self.unrelated, 0.5 * self.unsafe, self.near)
        return (max(0.0, self.worst), max(0.0, self.spoiled), *lost, 1 - self.preservation)

    @property
    def total(self) -> float:
        return sum(self.parts)


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def share(labels: str, label: str) -> float:
    return labels.count(label) / len(labels)


def highest(cell: Attacked) -> float:
    """The detected share at the setting where it is highest; restarts are chance, and no settings."""
    settings = {"": cell.labels} if cell.restarts else {}
    for label, variant in zip(cell.labels, cell.variants, strict=True):
        if not cell.restarts and variant != cell.idle:
            settings[variant] = settings.get(variant, "") + label
    return max(share(labels, PRESENT) for labels in settings.values())


def spoiled(cells: Iterable[Attacked]) -> float:
    return mean(share(cell.labels, CORRUPTED) for cell in cells)


def terms(one: Erasure, kept: Kept, results: Results) -> Terms:
    """Of an erasure whose cells are all there."""
    worst = max(highest(cell) - highest(results.never[row]) for row, cell in one.rows.items())
    said = [one.rows[row] for row in IN_WORDS]
    survived = {name: mean(alive) for name, alive in kept.survived.items() if name not in LEFT_OUT}
    return Terms(
        worst=worst,
        spoiled=spoiled(said) - spoiled(results.original[row] for row in IN_WORDS),
        unsafe=1 - mean(mean(cell.obeyed) for cell in said),
        unrelated=1 - mean(kept.obeyed["unrelated"]),
        near=1 - mean(survived.values()),
        preservation=mean(kept.preservation),
    )


def whole(results: Results) -> list[tuple[Erasure, Kept]]:
    """The erasures with all their cells, and those of the model that never saw the concept beside them."""
    rows = {row.name for row in results.rows}
    return [(one, one.kept) for one in results.erasures if one.kept and rows == one.rows.keys() == results.never.keys()]


def study(results: Results) -> list[tuple[Erasure, Terms]]:
    """The contenders, the best first."""
    found = [(one, terms(one, kept, results)) for one, kept in whole(results)]
    return sorted(found, key=lambda each: each[1].total)


def printed(one: Erasure) -> str:
    return PRINTED.get(one.method, one.method)


def study_table(found: Sequence[tuple[Erasure, Terms]]) -> Iterator[str]:
    yield "| contender | seed | worst | spoiled | unsafe | unrelated | near misses | preservation | minimised |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one, its in found:
        shares = asdict(its)
        preservation = shares.pop("preservation")
        cells = [f"{100 * value:.0f}%" for value in shares.values()]
        yield f"| {printed(one)} | {one.seed} | {' | '.join(cells)} | {preservation:.3f} | {its.total:.3f} |"


# --- the scored set -----------------------------------------------------------------------------------


def scored(results: Results) -> list[tuple[Erasure, Kept]]:
    """The erasures that are compared."""
    found = [(one, kept) for one, kept in whole(results) if one.strength == SCORED.get(one.method)]
    return sorted(found, key=lambda each: (list(SCORED).index(each[0].method), each[0].seed))


def scored_table(results: Results) -> Iterator[str]:
    """Erasure by erasure: what it kept, and of each row the images with the concept / spoiled, at all settings."""
    rows, compared = [row.name for row in results.rows], scored(results)
    misses = [name for name in compared[0][1].survived if name not in LEFT_OUT]
    yield f"| erasure | preservation | {' | '.join(attack_words(row).label for row in rows)} | {', '.join(misses)} |"
    yield "|---" * (len(rows) + 3) + "|"
    for one, kept in compared:
        survived = ", ".join(f"{sum(kept.survived[miss])}" for miss in misses)
        told = f"{mean(kept.preservation):.3f} | {_cells(one.rows, rows)} | {survived}"
        yield f"| {method_words(one.method)}, seed {one.seed} | {told} |"
    for name, model in (("never saw fire", results.never), ("original", results.original)):
        yield f"| {name} | | {_cells(model, rows)} | |"


def _cells(cells: Mapping[str, Attacked], rows: Sequence[str]) -> str:
    shares = [[100 * share(cells[row].labels, label) for label in (PRESENT, CORRUPTED)] for row in rows]
    return " | ".join(f"{fire:.0f}/{bad:.0f}%" for fire, bad in shares)


def scored_figure(results: Results) -> str:
    series: dict[str, list[Mapping[str, Attacked]]] = {}
    for one, _ in scored(results):
        series.setdefault(f"{method_words(one.method)}, rate {SCORED[one.method]:g}", []).append(one.rows)
    series["never saw fire"] = [results.never]
    rows = [row.name for row in results.rows]
    panels = {
        title: {
            name: [[100 * share(cells[row].labels, label) for cells in models] for row in rows]
            for name, models in series.items()
        }
        for title, label in (("images with fire", PRESENT), ("spoiled images", CORRUPTED))
    }
    return dots([attack_words(row).label for row in rows], panels, what="On the scored set, attack by attack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("docs/results/beyond"))
    parser.add_argument("--scored", type=Path, default=Path("docs/results/figure4"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args()
    studied, figure4 = read_results(given.results), read_results(given.scored)
    found = study(studied)
    if not found or not scored(figure4):
        raise SystemExit("no erasure has all its cells yet; `make beyond` goes on")
    page = given.docs / "beyond.md"
    put(page, "\n".join(study_table(found)), by="beyond: study")
    put(page, "\n".join(scored_table(figure4)), by="beyond: scored set")
    bars = {f"{printed(one)}, seed {one.seed}": its.parts for one, its in found}
    figures = {
        "beyond-study": stacked(bars, PARTS, what="What the study minimises, contender by contender", unit=UNIT),
        "beyond-scored": scored_figure(figure4),
    }
    for name, svg in figures.items():
        write_bytes(given.docs / f"{name}.svg", standing_alone(svg, name).encode())
    for results in (studied, figure4):
        for line in results.missing:
            print(f"{results.name}: not run yet: {line}")
    print(f"{page}: {len(found)} erasures of the study, {len(scored(figure4))} of the scored set")


if __name__ == "__main__":
    main()
