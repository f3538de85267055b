"""Put every method's erasure of the embedded model to the red team, and print one table: `docs/red-team.md`.

    python benchmarks/methods.py compare --out runs/methods                     # the erasures (docs/methods/README.md)
    python benchmarks/red_team.py --out runs/methods --budget quick             # each of them against every attack

    python benchmarks/red_team.py --run redirect=runs/demo --run published=runs/published   # erasures of other runs

It is `duo attack RUN --attack all --budget quick --report` for each `compare-<method>` of the folder, or for each
`--run`, whose column joins those that the JSON has. What does not depend on the erasure (the original model's rows,
those of the model that never saw fire, the images that attacks learn from) is made once, by the first, and taken over
by the others. What is finished is read back. Writes the JSON and the table of docs/red-team.md.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from beyond import PRINTED
from pages import put
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
BASELINES = ("plain_", "random_")  # how rows that are no attacks begin


def audited(run: Path, budget: str, first: Path | None) -> dict[str, Any]:
    """The scores of one run's erasure against the whole red team."""
    torch.set_num_threads(1)
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
    """Attacks by methods: the rate of each attack's best setting; in brackets where the control is not reached. Below
    an empty line are the baselines."""
    first = next(iter(found.values()))
    heads = " | ".join(PRINTED.get(name, name) for name in found)
    lines = [f"| attack | original | never saw it | {heads} |", "|---" * (3 + len(found)) + "|"]
    attacks = [name for name in first if not name.startswith(BASELINES)]
    for name in [*attacks, None, *(name for name in first if name not in attacks)]:
        if name is None:
            lines.append("| " * (3 + len(found)) + "|")
            continue
        models = first[name]
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
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[], help="some of the methods")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RUN", help="in place of --out's methods")
    given = parser.parse_args()
    named = dict(text.split("=", 1) if "=" in text else ("", text) for text in given.run)
    runs = {name: Path(run) for name, run in named.items()}
    if wrong := [str(run) for name, run in runs.items() if not name or not (run / "run.json").is_file()]:
        parser.error(f"--run {wrong[0]}: expected NAME=RUN, the folder of a run")
    runs = runs or {name: given.out / f"compare-{name}" for name in given.only or METHODS}
    first, *others = runs
    results = {first: audited(runs[first], given.budget, None)}
    shared = runs[first] / "red-team" / given.budget
    with ProcessPoolExecutor(given.workers, max_tasks_per_child=1) as pool:
        made = {name: pool.submit(audited, runs[name], given.budget, shared) for name in others}
        results |= {name: future.result() for name, future in made.items()}
    found = {name: compact(scores) for name, scores in results.items()}
    path = given.docs / "results" / f"red-team-{given.budget}.json"
    command = f"python benchmarks/red_team.py --budget {given.budget}"
    told: dict[str, Any] = {"methods": found, **machine(), "command": command}
    if given.run:
        command += "".join(f" --run {name}=RUN" for name in runs)
        told = read_json(path)
        told["methods"] |= found
        told["added"] = told.get("added", {}) | {name: {**machine(), "command": command} for name in runs}
    write_json(path, told)
    page = given.docs / "red-team.md"
    if given.budget == "quick":
        put(page, table(told["methods"]), by="red-team")
    print(table(told["methods"]))


if __name__ == "__main__":
    main()
