"""Put every method's erasure of the embedded model to the red team, and print one table: `docs/red-team.md`.

    python benchmarks/methods.py compare --out runs/methods                     # the erasures (docs/methods/README.md)
    python benchmarks/red_team.py --out runs/methods --budget quick             # each of them against every attack

It is `duo attack RUN --attack all --budget quick --report` for each `compare-<method>` of the folder. What does not
depend on the erasure (the original model's rows, those of the model that never saw fire, the images that attacks learn
from) is made once, by the first, and taken over by the others. What is finished is read back.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results import machine, take

from duo import Session
from duo.recipe import for_audit, load_recipe
from duo.red_team import red_team
from duo.rundir import read_json, write_json
from duo.stages import attack, report, score

METHODS = ("duo", "esd", "ca", "uce", "spm", "fmn", "sa")
SHARED = ("attack/*/original", "attack/*/never", "attack/images", "attack/harmless", "score/images/*/original")
KEPT = (
    "rate",
    "low",
    "high",
    "corrupted_rate",
    "prompt_rate",
    "k",
    "n",
    "reliable",
    "variants",
    "worst",
    "excess",
    "queries",
    "hardened",
)


def audited(out: Path, method: str, budget: str, first: Path | None) -> dict[str, Any]:
    """The scores of one method's erasure against the whole red team."""
    torch.set_num_threads(1)
    run = out / f"compare-{method}"
    folder = run / "red-team" / budget
    if first is not None:
        for pattern in SHARED:
            for source in first.glob(pattern):
                if (source / "manifest.json").exists() or "score" in source.parts:
                    take(source, folder / source.relative_to(first))
    recipe = red_team(for_audit(load_recipe("toybox-fire"), str(run)), budget=budget)
    session = Session(recipe, folder, command=f"duo attack {run} --attack all --budget {budget} --report")
    attack(session)
    score(session)
    report(folder)
    scores: dict[str, Any] = read_json(folder / "score" / "scores.json")
    return scores


def compact(scores: dict[str, Any]) -> dict[str, Any]:
    """Attack row → model → what is published of it."""
    rows: dict[str, Any] = {}
    for row in scores["attacks"]:
        rows.setdefault(row["name"], {})[row["model"]] = {key: row[key] for key in KEPT if key in row}
    return rows


def worst(row: dict[str, Any]) -> float:
    """The rate of an attack's best setting."""
    return max((part["rate"] for part in row.get("variants", [])), default=row["rate"])


def table(found: dict[str, Any]) -> str:
    """Attacks by methods: the rate of each attack's best setting; in brackets where the control is not reached."""
    first = next(iter(found.values()))
    lines = [f"| attack | original | never saw it | {' | '.join(found)} |", "|---" * (3 + len(found)) + "|"]
    for name, models in first.items():
        cells = [f"{worst(models['original']):.0%}", f"{worst(models['never']):.0%}"]
        for rows in found.values():
            if name not in rows:  # not defined for this erasure
                cells.append("–")
                continue
            row = rows[name]["erased"]
            cells.append(f"{worst(row):.0%}" if row["reliable"] else f"({worst(row):.0%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[], help="some of the methods")
    given = parser.parse_args()
    first, *others = given.only or METHODS
    results = {first: audited(given.out, first, given.budget, None)}
    shared = given.out / f"compare-{first}" / "red-team" / given.budget
    with ProcessPoolExecutor(given.workers, max_tasks_per_child=1) as pool:
        made = {name: pool.submit(audited, given.out, name, given.budget, shared) for name in others}
        results |= {name: future.result() for name, future in made.items()}
    found = {name: compact(scores) for name, scores in results.items()}
    command = f"python benchmarks/red_team.py --budget {given.budget}"
    write_json(given.docs / f"red-team-{given.budget}.json", {"methods": found, **machine(), "command": command})
    print(table(found))


if __name__ == "__main__":
    main()
