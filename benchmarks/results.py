"""Make the published numbers of erasures of the embedded model again: the longer part of `make results`.

    python benchmarks/results.py --out runs/results --docs docs/results
    python benchmarks/results.py --only picture     # the README's, of the demo in runs/demo

`acceptance` runs `--recipe` for three erasure seeds (pairs and training; the scored prompts and noise stay the
same, so the original model's images are made once) and reports the worst. `sweep` runs the published objective and the
demo's over β, and plots what is left of the concept against what is preserved. Both go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from duo import Session, load_recipe, run
from duo.recipe import Recipe
from duo.report.figures import TradeoffPoint, tradeoff
from duo.report.records import Mean
from duo.rundir import read_json, write_image, write_json
from duo.toybox import world_digest

SEEDS = (0, 1, 2)
SWEPT = {"toybox-fire-dpop": (5.0, 20.0, 80.0), "toybox-fire-published": (20.0, 80.0)}  # recipe → β
SWEEP_ROWS, SWEEP_IMAGES = ("prompts", "prompts_held_out_words"), 120


def machine() -> dict[str, str | bool]:
    """Where and from what the numbers come: what every file of results names; "dirty" where code was changed since.

    Changes below `docs` do not count: that is where the results go, those of the same command too.
    """
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs")
    processor = _processor() or platform.processor() or platform.machine()
    told = {"machine": f"{processor}, {os.cpu_count()} cores", "commit": commit, "world_digest": world_digest()}
    return {**told, **({"dirty": True} if changed else {})}


def _processor() -> str | None:
    """The name of the processor, where Linux tells it."""
    about = Path("/proc/cpuinfo")
    names = [line for line in about.read_text().splitlines() if line.startswith("model name")] if about.exists() else []
    return names[0].partition(":")[2].strip() if names else None


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def one(recipe: Recipe, out: Path, originals: Path | None, same_pairs: bool = False) -> dict[str, Any]:
    """A whole run in `out`; what the original model draws is taken over from the run `originals`, and so are its pairs
    where only the training differs."""
    torch.set_num_threads(1)
    if originals is not None:
        if same_pairs:
            take(originals / "pairs", out / "pairs")
        for folder in [*originals.glob("attack/*/original"), originals / "attack/images"]:
            take(folder, out / folder.relative_to(originals))
        for folder in originals.glob("score/images/*/original"):
            take(folder, out / folder.relative_to(originals))
    run(Session(recipe, out))
    report: dict[str, Any] = read_json(out / "report.json")
    return report


def take(source: Path, target: Path) -> None:
    """Copy a folder to where there is none yet."""
    if source.exists() and not target.exists():
        shutil.copytree(source, target)


def rates(report: dict[str, Any], field: str = "rate") -> dict[str, float]:
    """Attack row → rate on the erased model."""
    return {row["name"]: row[field] for row in report["attacks"] if row["model"] == "erased"}


def acceptance(name: str, out: Path, docs: Path, workers: int) -> None:
    """Three seeds; published whole is the worst, by the highest detected rate over prompts, then the corrupted one."""
    base = load_recipe(name)
    recipes = [replace(base, erase_seed=seed) for seed in SEEDS]
    first = one(recipes[0], out / "seed-0", None)
    with ProcessPoolExecutor(workers) as pool:
        rest = pool.map(one, recipes[1:], [out / f"seed-{s}" for s in SEEDS[1:]], [out / "seed-0"] * 2)
        reports = [first, *rest]
    asked = [row.row for row in base.attacks if row.name == "prompts"]
    worst = max(
        range(len(SEEDS)),
        key=lambda i: tuple(
            max(rates(reports[i], field)[name] for name in asked) for field in ("rate", "corrupted_rate")
        ),
    )
    summary = {
        "recipe": name,
        "worst_seed": SEEDS[worst],
        "seeds": {
            str(seed): {
                "detected": rates(report),
                "corrupted": rates(report, "corrupted_rate"),
                "preservation": report["preservation"],
                "attributes": report["attributes"],
                "near_misses": report["near_misses"],
            }
            for seed, report in zip(SEEDS, reports, strict=True)
        },
        **machine(),
        "command": f"python benchmarks/results.py --only acceptance --recipe {name}",
    }
    write_json(docs / f"{name}.json", summary)
    shutil.copyfile(out / f"seed-{SEEDS[worst]}" / "report.json", docs / f"{name}-report.json")
    sys.stdout.write(json.dumps({"worst seed": SEEDS[worst], **rates(reports[worst])}, indent=1) + "\n")


def picture(run_folder: Path, path: Path) -> None:
    """The README's picture: the same prompts and noise before and after, the first of each set."""
    sets = [("attack/prompts/{}/images", 4), ("attack/prompts_held_out_words/{}/images", 2)]
    sets += [("score/images/unrelated/{}", 3)]
    side, gap = 128, 6
    columns = sum(count for _, count in sets)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, 2 * side + gap), "white")
    for row, model in enumerate(("original", "erased")):
        shown = [run_folder / folder.format(model) / f"{i:04d}.png" for folder, count in sets for i in range(count)]
        for column, file in enumerate(shown):
            with Image.open(file) as image:
                sheet.paste(
                    image.resize((side, side), Image.Resampling.LANCZOS), (column * (side + gap), row * (side + gap))
                )
    write_image(path, sheet)


def sweep(out: Path, docs: Path, workers: int) -> None:
    """β against detection and preservation, for the published objective and with DPO-Positive's penalty."""
    jobs = []
    for name, betas in SWEPT.items():
        for beta in betas:
            recipe = load_recipe(
                name, overrides=[f"method.beta={beta}", f"score.unrelated={SWEEP_IMAGES}", "score.near_miss=0"]
            )
            rows = tuple(replace(row, images=SWEEP_IMAGES) for row in recipe.attacks if row.row in SWEEP_ROWS)
            jobs.append((name, beta, replace(recipe, attacks=rows), out / f"sweep-{name}-{beta:g}"))
    one(jobs[0][2], jobs[0][3], None)
    with ProcessPoolExecutor(workers) as pool:
        reports = list(
            pool.map(one, [j[2] for j in jobs], [j[3] for j in jobs], [jobs[0][3]] * len(jobs), [True] * len(jobs))
        )
    points = []
    for (name, beta, _, _), report in zip(jobs, reports, strict=True):
        for row in report["attacks"]:
            if row["model"] == "erased":
                kept = report["preservation"]
                points.append(
                    {
                        "recipe": name,
                        "beta": beta,
                        "attack": row["name"],
                        **{key: row[key] for key in ("n", "rate", "low", "high", "corrupted_rate")},
                        "preservation": kept["mean"],
                        "preservation_low": kept["low"],
                        "preservation_high": kept["high"],
                    }
                )
    write_json(docs / "tradeoff.json", {"points": points, **machine(), "command": "make results"})
    (docs / "tradeoff.svg").write_text(plotted(points))


def plotted(points: list[dict[str, Any]]) -> str:
    """The points of `tradeoff.json` as an SVG: one series for each recipe and attack."""
    return tradeoff(
        [
            TradeoffPoint(
                series=f"{point['recipe']}: {point['attack'].replace('_', ' ')}",
                label=f"{point['beta']:g}",
                detection=Mean(mean=point["rate"], low=point["low"], high=point["high"], n=point["n"]),
                preservation=Mean(
                    mean=point["preservation"],
                    low=point["preservation_low"],
                    high=point["preservation_high"],
                    n=SWEEP_IMAGES,
                ),
            )
            for point in points
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recipe", default="toybox-fire-full", help="of the acceptance; default: %(default)s")
    parser.add_argument("--only", choices=("acceptance", "sweep", "picture"))
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the run of the picture")
    given = parser.parse_args()
    given.docs.mkdir(parents=True, exist_ok=True)
    if given.only == "picture":
        picture(given.demo, given.docs.parent / "images" / "before-after.png")
    if given.only in (None, "acceptance"):
        acceptance(given.recipe, given.out / given.recipe, given.docs, given.workers)
    if given.only in (None, "sweep"):
        sweep(given.out, given.docs, given.workers)


if __name__ == "__main__":
    main()
