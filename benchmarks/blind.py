"""Are an erasure's pictures spoiled, by eye? Looked at blind, among those of other models.

    python benchmarks/blind.py draw --out runs/blind --erased redirect=A.safetensors --erased duo=B.safetensors
    python benchmarks/blind.py compare --out runs/blind --labels one.csv two.csv --docs docs/results

`draw` renders scored prompts that ask for fire with the erasures of each name (several deltas take turns) and, of the
same prompts and noise, with the model that never saw fire; shuffles all, and writes numbered sheets that show the
prompts, for what an image lacks can only be told beside what was asked. Each rater writes a CSV with the columns
`number,label`; the labels are absent (a sound picture without fire), present and corrupted. `compare` adds the key and
both judges' verdicts, writes all columns to `blind.csv`, and to `blind.json` what each rater and judge found of each
model, and how far they agree.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from agreement import ROLES, read_labels, sheets
from PIL import Image
from results import machine

from duo import Delta, load_concept, load_family, load_recipe
from duo.judges.toybox import Toybox
from duo.rundir import read_json, write_image, write_json
from duo.statistics import wilson

EACH = 72  # images of each name
FIRST_SEED = 290_000
SETS = ("plain", "held_out_subjects")
NEVER = "never"


def draw(erased: Mapping[str, Sequence[Path]], out: Path) -> None:
    """Render, shuffle, and write `images/NNN.png`, `sheet-N.png` and `key.json`."""
    recipe, concept = load_recipe("toybox-fire"), load_concept("toybox-fire")
    asked = [
        (name, concept.prompt_set(name)[i // len(SETS)]) for i, name in zip(range(EACH), SETS * EACH, strict=False)
    ]
    names = [NEVER, *erased]
    numbers = np.random.default_rng(13).permutation(EACH * len(names)).reshape(len(names), EACH).tolist()
    key = {}
    for name, own in zip(names, numbers, strict=True):
        model = load_family("toybox-never-fire" if name == NEVER else recipe.model, device="cpu")
        sources = erased.get(name, [None])
        for turn, source in enumerate(sources):
            mine = [i for i in range(EACH) if i // len(SETS) % len(sources) == turn]  # both sets
            with Delta.load(source).attached(model) if source else nullcontext():
                images = model.generate(
                    [asked[i][1] for i in mine],
                    seeds=[FIRST_SEED + i for i in mine],
                    sampling=recipe.sampling,
                )
            for i, image in zip(mine, images, strict=True):
                write_image(out / "images" / f"{own[i]:03d}.png", image)
                told = dict(zip(("set", "prompt"), asked[i], strict=True))
                key[str(own[i])] = {"model": name, "erasure": turn, **told, "seed": FIRST_SEED + i}
    write_json(out / "key.json", key)
    sheets(out, {int(number): "\n".join([number, *wrap(row["prompt"], 32)]) for number, row in key.items()})


def compare(out: Path, labels: Sequence[Path], docs: Path) -> dict[str, Any]:
    """Write `blind.csv` and `blind.json`, and return what the latter has."""
    key = read_json(out / "key.json")
    numbers = sorted(key, key=int)
    images = []
    for number in numbers:
        with Image.open(out / "images" / f"{int(number):03d}.png") as image:
            images.append(image.convert("RGB"))
    said = {role: [one.label for one in Toybox(hazard="fire", role=role)(images)] for role in ROLES}
    for rater, path in enumerate(labels, 1):
        given = {row["number"]: row["label"] for row in read_labels(path)}
        if odd := sorted(key.keys() ^ given.keys(), key=int):
            raise SystemExit(f"{path}: number {odd[0]} is {'not labelled' if odd[0] in key else 'no picture of --out'}")
        said[f"eye_{rater}"] = [given[number] for number in numbers]
    with (docs / "blind.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ("number", *key[numbers[0]], *said), lineterminator="\n")
        table.writeheader()
        for i, number in enumerate(numbers):
            table.writerow({"number": number, **key[number], **{name: found[i] for name, found in said.items()}})
    told = summary([key[number]["model"] for number in numbers], said)
    write_json(docs / "blind.json", {**machine(), **told})
    return told


def summary(models: Sequence[str], said: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Of each model what each rater and judge found, and of each two of these how often they agree."""
    shares: dict[str, Any] = {}
    for model in sorted(set(models)):
        for who, found in said.items():
            own = [label for label, name in zip(found, models, strict=True) if name == model]
            counts = {
                label: (own.count(label), wilson(own.count(label), len(own))) for label in ("present", "corrupted")
            }
            shares.setdefault(model, {})[who] = {
                label: {"n": len(own), "count": count, "low": low, "high": high}
                for label, (count, (low, high)) in counts.items()
            }
    pairs = {}
    for one, other in combinations(said, 2):
        both = list(zip(said[one], said[other], strict=True))
        pairs[f"{one}, {other}"] = {
            "agree": sum(a == b for a, b in both),
            "spoiled_by_both": sum(a == b == "corrupted" for a, b in both),
            "spoiled_by_either": sum("corrupted" in pair for pair in both),
            "n": len(both),
        }
    return {"models": shares, "agreement": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("draw", "compare"))
    parser.add_argument("--erased", action="append", default=[], metavar="NAME=DELTA")
    parser.add_argument("--out", type=Path, default=Path("runs/blind"))
    parser.add_argument("--labels", type=Path, nargs="+", default=[])
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    if given.step == "compare" and not given.labels:
        parser.error("compare needs --labels, a file of each rater")
    torch.set_num_threads(1)
    if given.step == "draw":
        erased: dict[str, list[Path]] = {}
        for text in given.erased:
            name, _, path = text.partition("=")
            erased.setdefault(name, []).append(Path(path))
        draw(erased, given.out)
        return
    for model, found in compare(given.out, given.labels, given.docs)["models"].items():
        print(model, *(f"{who}: {one['corrupted']['count']} of {one['corrupted']['n']}" for who, one in found.items()))


if __name__ == "__main__":
    main()
