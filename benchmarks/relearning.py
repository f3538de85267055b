"""How much of the concept comes back by fine-tuning, from the cells of `duo bench toybox-relearning`: the table of
docs/beyond.md.

    python benchmarks/relearning.py docs/results/relearning

A column for each row and number of steps: images with the concept, and those that are spoiled. Erasures beside the
original model and the one that never saw the concept, which fine-tuning teaches it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from beyond import share
from pages import put

from duo.report.tradeoff.cells import CORRUPTED, PRESENT, Attacked, Results, read_results

ROWS = {"relearn_concept": "fires", "relearn_harmless": "harmless"}


def by_steps(cell: Attacked) -> dict[str, str]:
    """Labels of each number of steps, in the order in which they come."""
    found: dict[str, str] = {}
    for label, variant in zip(cell.labels, cell.variants, strict=True):
        found[variant] = found.get(variant, "") + label
    return found


def models(results: Results) -> Iterator[tuple[str, Mapping[str, Attacked], float | None]]:
    """Who is compared: the name, its rows, and what an erasure kept of unrelated images."""
    yield "original", results.original, 1.0
    yield "never saw the concept", results.never, None
    for one in sorted(results.erasures, key=lambda one: (one.method, str(one.strength), str(one.seed))):
        strength = f" {one.strength:g}" if isinstance(one.strength, float) else ""
        kept = sum(one.kept.preservation) / len(one.kept.preservation) if one.kept else None
        yield f"{one.method}{strength}, seed {one.seed}", one.rows, kept


def table(results: Results) -> str:
    """Of whoever has both rows."""
    head = [(row, steps) for row in ROWS for steps in by_steps(results.original[row])]
    lines = [
        f"| images with the concept / spoiled, % | preservation | {' | '.join(f'{ROWS[r]}, {s}' for r, s in head)} |",
        "|---" * (2 + len(head)) + "|",
    ]
    for name, rows, kept in models(results):
        if not ROWS.keys() <= rows.keys():
            continue
        cells = []
        for row, steps in head:
            labels = by_steps(rows[row])[steps]
            cells.append(" / ".join(f"{100 * share(labels, one):.0f}" for one in (PRESENT, CORRUPTED)))
        lines.append(f"| {name} | {'–' if kept is None else f'{kept:.3f}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("docs/results/relearning"))
    parser.add_argument("--page", type=Path, default=Path("docs/beyond.md"))
    given = parser.parse_args()
    found = read_results(given.results)
    put(given.page, table(found), by="relearning")
    for line in found.missing:
        print(f"not in the table, not run yet: {line}")


if __name__ == "__main__":
    main()
