"""Are an erasure's pictures spoiled, by eye? Looked at blind, among those of other models.

    python benchmarks/blind.py draw --out runs/blind --erased redirect=A.safetensors --erased duo=B.safetensors
    python benchmarks/blind.py compare --out runs/blind --labels one.csv two.csv --name blind-second

`draw` renders scored prompts that ask for fire with the erasures of each name (several deltas take turns) and, of the
same prompts and noise, with the model that never saw fire, and with the original asked for the same scenes without
fire. It shuffles all, and writes numbered sheets that show the scene that each is to be, for what an image lacks can
only be told beside what was asked; whether fire was asked for too they do not tell. Each rater writes a CSV with the
columns `number,label`; the labels are absent (a sound picture without fire), present and corrupted. `compare` adds the
key and both judges' verdicts, and writes into `--docs` all columns (results/NAME.csv), what each rater and judge found
of each model and how far they agree (results/NAME.json), and the pictures in which most raters see something wrong,
beside those of the other models (images/NAME.png).

The first look (`blind.csv`) was at the erasures of two methods beside the model that never saw fire, and its sheets
showed the prompts.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from textwrap import wrap
from typing import Any

import floor
import numpy as np
import torch
from agreement import ROLES, read_labels, sheets
from PIL import Image, ImageDraw
from results import machine

from duo.judges.toybox import Toybox
from duo.rundir import read_json, write_image, write_json
from duo.statistics import wilson

EACH = 72  # images of each name
FIRST_SEED = 320_000  # of the second look; the first had 290,000
ACROSS = 4  # scenes in a row of the picture
NEVER, ORIGINAL = "never", "original"


def draw(erased: Mapping[str, Sequence[Path]], out: Path, *, first_seed: int) -> None:
    """Render, shuffle, and write `images/NNN.png`, `sheet-N.png` and `key.json`."""
    rows = floor.asked(EACH)
    sources: dict[str, Sequence[Path | None]] = {NEVER: [None], ORIGINAL: [None], **erased}
    numbers = np.random.default_rng(first_seed).permutation(EACH * len(sources)).reshape(len(sources), EACH).tolist()
    key = {}
    for (name, files), own in zip(sources.items(), numbers, strict=True):
        for turn, file in enumerate(files):
            mine = [i for i in range(EACH) if i // len(floor.SETS) % len(files) == turn]  # both sets
            model = {NEVER: floor.NEVER, ORIGINAL: floor.ORIGINAL}.get(name, name)
            images = floor.draw(model, file, [rows[i][1] for i in mine], [first_seed + i for i in mine])
            for i, image in zip(mine, images, strict=True):
                write_image(out / "images" / f"{own[i]:03d}.png", image)
                told = dict(zip(("set", "prompt"), rows[i], strict=True))
                key[str(own[i])] = {"model": name, "erasure": turn, **told, "seed": first_seed + i}
    write_json(out / "key.json", key)
    scenes = {number: wrap(floor.without(row["prompt"]), 32) for number, row in key.items()}
    sheets(out, {int(number): "\n".join([number, *lines]) for number, lines in scenes.items()})


def compare(out: Path, labels: Sequence[Path], docs: Path, *, name: str) -> dict[str, Any]:
    """Write `name`.csv, `name`.json and `name`.png, and return what the JSON has."""
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
    rows = [
        {"number": number, **key[number], **{who: found[i] for who, found in said.items()}}
        for i, number in enumerate(numbers)
    ]
    with (docs / "results" / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    told = summary([key[number]["model"] for number in numbers], said)
    write_json(docs / "results" / f"{name}.json", {**machine(), **told})
    write_image(docs / "images" / f"{name}.png", side_by_side(rows, dict(zip(numbers, images, strict=True))))
    return told


def wrong(row: Mapping[str, Any]) -> bool:
    """Whether most raters see fire in a picture, or call it spoiled."""
    labels = [label for who, label in row.items() if who.startswith("eye_")]
    return 2 * sum(label != "absent" for label in labels) > len(labels)


def side_by_side(rows: Sequence[Mapping[str, Any]], images: Mapping[str, Image.Image]) -> Image.Image:
    """Of the same prompt and noise the pictures of all models in turn, wherever one of them is `wrong`: that is framed.

    The order of models is that of their names; the scene stands above.
    """
    scenes: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        scenes.setdefault(row["seed"], {})[row["model"]] = row
    shown = [scene for scene in scenes.values() if any(map(wrong, scene.values()))]
    models, side, head, gap = len(rows) // len(scenes), 96, 14, 12
    width, height = models * side + gap, side + head
    sheet = Image.new("RGB", (ACROSS * width - gap, -(-len(shown) // ACROSS) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, scene in enumerate(shown):
        x, y = i % ACROSS * width, i // ACROSS * height
        pen.text((x, y), next(iter(scene.values()))["prompt"], fill="black")
        for place, (_, row) in enumerate(sorted(scene.items())):
            corner = (x + place * side, y + head)
            sheet.paste(images[row["number"]].resize((side, side), Image.Resampling.NEAREST), corner)
            if wrong(row):
                pen.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), outline="red", width=2)
    return sheet


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
    parser.add_argument("--erased", type=floor.erasure, action="append", default=[], metavar="NAME=DELTA")
    parser.add_argument("--out", type=Path, default=Path("runs/blind"))
    parser.add_argument("--labels", type=Path, nargs="+", default=[])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--name", default="blind-second", help="of the files in --docs (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the noise (default: %(default)s)")
    given = parser.parse_args()
    if given.step == "compare" and not given.labels:
        parser.error("compare needs --labels, a file of each rater")
    torch.set_num_threads(1)
    if given.step == "draw":
        erased: dict[str, list[Path]] = {}
        for name, file in given.erased:
            erased.setdefault(name, []).append(file)
        draw(erased, given.out, first_seed=given.first_seed)
        return
    told = compare(given.out, given.labels, given.docs, name=given.name)
    for model, found in told["models"].items():
        print(model, *(f"{who}: {one['corrupted']['count']} of {one['corrupted']['n']}" for who, one in found.items()))


if __name__ == "__main__":
    main()
