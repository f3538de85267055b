"""Harden DUO's erasure of fire, and put every round to the red team: `docs/hardening.md`.

    python benchmarks/hardening.py --out runs/hardening

For each erasure seed it makes the pairs and the erasure of `--recipe`, and puts each round's erasure to one budget: the
scored prompts and their noise are the same, so rounds are compared image by image, and attacks that were used to harden
with those that were held out. What does not depend on the erasure is made once; what is finished is read back. Writes
`hardening.json` to `--docs`, `hardening.svg` (the first seed) beside `--page`, and the table into it.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pages import put
from red_team import SHARED, compact, worst
from results import machine, take

from duo import Session, erase, load_recipe, make_pairs
from duo.recipe import Recipe, for_audit
from duo.red_team import red_team
from duo.report.figures import hardening_rounds, standing_alone
from duo.report.hardening import Counted, Hardening, HardeningRound, RoundAttack
from duo.report.json_fields import read_object
from duo.report.wording import attack_words
from duo.rundir import read_json, write_bytes, write_json
from duo.stages import attack, report, score

SEEDS = (0, 1, 2)


def hardened(recipe: Recipe, out: Path) -> Hardening:
    """One hardened erasure, up to its rounds, and what they say of themselves."""
    session = Session(recipe, out)
    make_pairs(session)
    erase(session)
    found = Hardening.of(out, read_object(out / "erase" / "manifest.json"))
    assert found is not None  # the recipe has rounds
    return found


def audited(recipe: Recipe, made: Path, budget: str, first: Path) -> dict[str, Any]:
    """The scores of one round's erasure, in `made`, against a budget; what is shared is of the audit `first`."""
    folder = made / "red-team"
    for pattern in SHARED if folder != first else ():
        for source in first.glob(pattern):
            if (source / "manifest.json").exists() or "score" in source.parts:
                take(source, folder / source.relative_to(first))
    session = Session(red_team(for_audit(recipe, str(made)), budget=budget), folder)
    attack(session)
    score(session)
    report(folder)
    scores: dict[str, Any] = read_json(folder / "score" / "scores.json")
    return {**scores, "attacks": [row for row in scores["attacks"] if not row.get("baseline")]}


def curve(found: Hardening, scored: list[dict[str, Any]]) -> str:
    """Scored rates and preservation over rounds, as the report draws those of validation prompts."""
    used = {row["name"] for row in scored[-1]["attacks"] if row.get("hardened")}
    rounds = [
        HardeningRound(
            number=one.number,
            pairs=one.pairs,
            added=one.added,
            attacks=tuple(_counted(row, used) for row in scores["attacks"] if row["model"] == "erased"),
            kept=tuple(scores["preservation"][name] for name in ("mean", "low", "high")),
            seconds=one.seconds,
            denoiser=one.denoiser,
        )
        for one, scores in zip(found.rounds, scored, strict=True)
    ]
    return hardening_rounds(replace(found, rounds=tuple(rounds)), of="scored prompts")


def _counted(row: dict[str, Any], used: set[str]) -> RoundAttack:
    top = max(row.get("variants", [row]), key=lambda part: float(part["rate"]))
    numbers = {name: top[name] for name in ("n", "detected", "rate", "low", "high")}
    told = Counted(**numbers, corrupted=row["corrupted"], setting=top.get("variant"))
    return RoundAttack(row=row["name"], learned=row["name"] in used, tried=0, brought_back=0, counted=told)


def table(seeds: dict[str, Any]) -> str:
    """Attack rows by rounds: the rate of the best setting, seed by seed; then preservation and cost."""
    most = max(len(one["rounds"]) for one in seeds.values())
    lines = [f"| | {' | '.join(f'round {i}' for i in range(most))} |", "|---" * (1 + most) + "|"]

    def line(name: str, cell: Any) -> str:
        cells = [
            ", ".join(cell(one, i) if i < len(one["rounds"]) else "–" for one in seeds.values()) for i in range(most)
        ]
        return f"| {name} | {' | '.join(cells)} |"

    last = next(iter(seeds.values()))["scored"][-1]["attacks"]
    for row in sorted(last, key=lambda row: bool(last[row]["erased"].get("hardened"))):
        used = " (used to harden)" if last[row]["erased"].get("hardened") else ""
        lines.append(
            line(
                f"{attack_words(row).label}{used}",
                lambda one, i, row=row: f"{worst(one['scored'][i]['attacks'][row]['erased']):.0%}",
            )
        )
    lines.append(line("spoiled, plain prompts", lambda one, i: f"{_spoiled(one['scored'][i], ['prompts']):.0%}"))
    lines.append(line("spoiled, mean of all rows", lambda one, i: f"{_spoiled(one['scored'][i], last):.0%}"))
    lines.append(line("preservation", lambda one, i: f"{one['scored'][i]['preservation']['mean']:.3f}"))
    lines.append(line("pairs", lambda one, i: str(one["rounds"][i]["pairs"]["learned_from"])))
    lines.append(line("seconds", lambda one, i: f"{one['rounds'][i]['seconds']:.0f}"))
    lines.append(line("denoiser rows", lambda one, i: f"{one['rounds'][i]['denoiser']:,}"))
    return "\n".join(lines)


def _spoiled(scores: dict[str, Any], rows: Collection[str]) -> float:
    rates: list[float] = [scores["attacks"][row]["erased"]["corrupted_rate"] for row in rows]
    return sum(rates) / len(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hardening"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/hardening.md"))
    parser.add_argument("--recipe", default="toybox-fire-hardened")
    parser.add_argument("--budget", default="bench")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--set", action="append", default=[], help="replace a value of the recipe")
    given = parser.parse_args()
    if not given.seeds:
        parser.error("--seeds needs one at least")
    torch.set_num_threads(1)
    base = load_recipe(given.recipe, overrides=given.set)
    if base.hardens is None:
        parser.error(f"the recipe {given.recipe} has no rounds of hardening (hardening.rounds)")
    told: dict[str, Any] = {}
    first = given.out / f"seed-{given.seeds[0]}" / "erase" / "round-0" / "red-team"
    for seed in given.seeds:
        run = given.out / f"seed-{seed}"
        found = hardened(replace(base, erase_seed=seed), run)
        made = [run / "erase" / f"round-{one.number}" for one in found.rounds]
        scored = [audited(base, folder, given.budget, first) for folder in made]
        if seed == given.seeds[0]:
            svg = standing_alone(curve(found, scored), "hardening")
            write_bytes(given.page.with_name("hardening.svg"), svg.encode())
        told[str(seed)] = {
            "rounds": found.table()["rounds"],
            "stopped": found.stopped,
            "scored": [
                {
                    "attacks": compact(scores),
                    **{name: scores[name] for name in ("preservation", "attributes", "near_misses")},
                }
                for scores in scored
            ],
        }
        sets = [part for one in given.set for part in ("--set", one)]
        command = ["python", "benchmarks/hardening.py", "--recipe", given.recipe, "--budget", given.budget, *sets]
        write_json(given.docs / "hardening.json", {"seeds": told, **machine(), "command": shlex.join(command)})
    put(given.page, table(told), by="hardening")


if __name__ == "__main__":
    main()
