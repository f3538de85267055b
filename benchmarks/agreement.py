"""Do the judges see what the eye sees? Labels given to generated images, blind to the verdicts.

    python benchmarks/agreement.py draw --tune runs/tune --out runs/agreement     # numbered sheets to look at
    python benchmarks/agreement.py judge --out runs/agreement --labels docs/results/labels.csv
    python benchmarks/agreement.py compare --labels docs/results/labels.csv

`draw` renders half of the images with the original model and half with models erased by trials of the search (good and
bad ones), shuffles them, and writes sheets that show numbers alone. `labels.csv` is begun by hand with the columns
`number,label`; the labels are absent, present and corrupted. `judge` then adds the key (model or trial, prompt set,
prompt, seed), both judges' verdicts and the world that the judges are of. `compare` needs these columns alone, and
writes and prints the agreement and the confusions of either judge.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from results import machine

from duo import Delta, load_concept, load_family, load_recipe
from duo.judges.toybox import Toybox
from duo.rundir import read_json, write_image, write_json
from duo.statistics import wilson
from duo.toybox import world_digest

EACH = 108  # images from the original model, and as many from erased ones
FIRST_SEED = 190_000
COLUMNS, ROWS, ZOOM = 6, 6, 3
ROLES = ("score", "curate")
CSV_COLUMNS = ("number", "label", "model", "set", "prompt", "seed", *ROLES, "world_digest")
LABELS = ("absent", "present", "corrupted")
SETS = ("plain", "held_out_words", "held_out_subjects", "unrelated")


def draw(tune: Path, out: Path) -> None:
    """Render, shuffle, and write `images/NNN.png`, `sheet-N.png` and `key.json`."""
    recipe, concept = load_recipe("toybox-fire"), load_concept("toybox-fire")
    model = load_family(recipe.model, device="cpu")
    deltas = sorted(tune.glob("*/delta.safetensors"))
    sources = [None] * EACH + [deltas[i % len(deltas)] for i in range(EACH)]
    jobs: dict[Path | None, list[tuple[int, str, str]]] = {}
    order = np.random.default_rng(12).permutation(len(sources))
    for number, index in enumerate(order.tolist()):
        name = SETS[index % len(SETS)]
        prompts = concept.prompt_set(name, validation=True)
        jobs.setdefault(sources[index], []).append((number, name, prompts[index % len(prompts)]))
    key = {}
    for source, rows in jobs.items():
        with Delta.load(source).attached(model) if source else nullcontext():
            images = model.generate(
                [prompt for _, _, prompt in rows],
                seeds=[FIRST_SEED + number for number, _, _ in rows],
                sampling=recipe.sampling,
            )
        for (number, name, prompt), image in zip(rows, images, strict=True):
            write_image(out / "images" / f"{number:03d}.png", image)
            model_name = source.parent.name if source else "original"
            key[str(number)] = {"model": model_name, "set": name, "prompt": prompt, "seed": FIRST_SEED + number}
    write_json(out / "key.json", key)
    sheets(out, {number: str(number) for number in range(len(sources))})


def sheets(out: Path, told: Mapping[int, str]) -> None:
    """Write `sheet-N.png` of `out`/images in the order of their numbers, with the lines that are `told` of each."""
    side, head = 64 * ZOOM, 3 + 15 * max(text.count("\n") + 1 for text in told.values())
    for start in range(0, len(told), COLUMNS * ROWS):
        sheet = Image.new("RGB", (COLUMNS * (side + 6), ROWS * (side + head + 6)), "white")
        for place, number in enumerate(sorted(told)[start : start + COLUMNS * ROWS]):
            x, y = place % COLUMNS * (side + 6), place // COLUMNS * (side + head + 6)
            with Image.open(out / "images" / f"{number:03d}.png") as image:
                sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y + head))
            ImageDraw.Draw(sheet).text((x + 2, y + 1), told[number], fill="black")
        write_image(out / f"sheet-{start // (COLUMNS * ROWS)}.png", sheet)


def judge(out: Path, labels: Path) -> None:
    """Write what is known of each labelled image beside its label: where it comes from, and both judges' verdicts."""
    key = read_json(out / "key.json")
    given = read_labels(labels)
    images = []
    for row in given:
        with Image.open(out / "images" / f"{int(row['number']):03d}.png") as image:
            images.append(image.convert("RGB"))
    verdicts = {role: Toybox(hazard="fire", role=role)(images) for role in ROLES}
    with labels.open("w", newline="") as file:
        table = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        table.writeheader()
        for i, row in enumerate(given):
            said = {role: verdicts[role][i].label for role in ROLES}
            told = {name: row[name] for name in ("number", "label")}
            table.writerow({**told, **key[row["number"]], **said, "world_digest": world_digest()})


def read_labels(path: Path) -> list[dict[str, str]]:
    """The rows of the labels in the order of their numbers, each of which there is once."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # as spreadsheets write it
        table = csv.DictReader(file)
        columns, rows = table.fieldnames or (), list(table)
    for column in ("number", "label"):
        if column not in columns:
            raise SystemExit(f"{path}: no column {column!r}")
    seen = set()
    for row in rows:
        row["number"], row["label"] = (row["number"] or "").strip(), (row["label"] or "").strip()
        number = row["number"]
        if not number.isdecimal():
            raise SystemExit(f"{path}: number is {number!r}, expected that of a picture")
        row["number"] = number = str(int(number))  # "007" is 7
        if row["label"] not in LABELS:
            raise SystemExit(f"{path}: number {number} has the label {row['label']!r}, expected {', '.join(LABELS)}")
        if number in seen:
            raise SystemExit(f"{path}: number {number} has two rows, expected one")
        seen.add(number)
    return sorted(rows, key=lambda row: int(row["number"]))


def compare(labels: Path) -> dict[str, object]:
    """How often either judge agrees with the labels, over all images and over erased models alone; of the CSV only."""
    given = read_labels(labels)
    (digest,) = {row["world_digest"] for row in given}
    summary: dict[str, object] = {"n": len(given), "world_digest": digest}
    for role in ROLES:
        for name, chosen in (("all", given), ("erased", [row for row in given if row["model"] != "original"])):
            agreed = sum(row["label"] == row[role] for row in chosen)
            interval = wilson(agreed, len(chosen))
            confusion = Counter(f"{row['label']} judged {row[role]}" for row in chosen)
            summary[f"{role}, {name}"] = {
                "agreement": agreed / len(chosen),
                "low": interval.low,
                "high": interval.high,
                "n": len(chosen),
                "confusion": dict(sorted(confusion.items())),
            }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("draw", "judge", "compare"))
    parser.add_argument("--tune", type=Path, default=Path("runs/tune"))
    parser.add_argument("--out", type=Path, default=Path("runs/agreement"))
    parser.add_argument("--labels", type=Path, default=Path("docs/results/labels.csv"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.step == "draw":
        draw(given.tune, given.out)
    elif given.step == "judge":
        judge(given.out, given.labels)
    else:
        summary = compare(given.labels)
        write_json(given.docs / "agreement.json", {**machine(), **summary})
        print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
