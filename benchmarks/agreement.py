"""Do the judges see what the eye sees? Labels given to generated images, blind to the verdicts.

    python benchmarks/agreement.py draw --tune runs/tune --out runs/agreement     # numbered sheets to look at
    python benchmarks/agreement.py compare --out runs/agreement --labels docs/results/labels.csv

`draw` renders half of the images with the original model and half with models erased by trials of the search (good and
bad ones), shuffles them, and writes sheets that show numbers alone. `labels.csv` has the columns `number,label` with
the labels absent, present and corrupted. `compare` prints the agreement and the confusions of either judge.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from duo import Delta, load_concept, load_family, load_recipe
from duo.judges.toybox import Toybox
from duo.rundir import read_json, write_image, write_json
from duo.statistics import wilson
from duo.toybox import world_digest

EACH = 108  # images from the original model, and as many from erased ones
COLUMNS, ROWS, ZOOM = 6, 6, 3
SETS = ("plain", "held_out_words", "held_out_subjects", "unrelated")


def draw(tune: Path, out: Path) -> None:
    """Render, shuffle, and write `images/NNN.png`, `sheet-N.png` and `key.json`."""
    recipe, concept = load_recipe("toybox-fire"), load_concept("toybox-fire")
    model = load_family(recipe.model, device="cpu")
    deltas = sorted(tune.glob("*/delta.safetensors"))
    sources = [None] * EACH + [deltas[i % len(deltas)] for i in range(EACH)]
    jobs: dict[Path | None, list[tuple[int, str]]] = {}
    order = np.random.default_rng(12).permutation(len(sources))
    for number, index in enumerate(order.tolist()):
        prompts = concept.prompt_set(SETS[index % len(SETS)], validation=True)
        jobs.setdefault(sources[index], []).append((number, prompts[index % len(prompts)]))
    key = {}
    for source, rows in jobs.items():
        with Delta.load(source).attached(model) if source else nullcontext():
            images = model.generate(
                [prompt for _, prompt in rows],
                seeds=[190_000 + number for number, _ in rows],
                sampling=recipe.sampling,
            )
        for (number, prompt), image in zip(rows, images, strict=True):
            write_image(out / "images" / f"{number:03d}.png", image)
            key[str(number)] = {"prompt": prompt, "model": source.parent.name if source else "original"}
    write_json(out / "key.json", key)
    side = 64 * ZOOM
    for start in range(0, len(sources), COLUMNS * ROWS):
        sheet = Image.new("RGB", (COLUMNS * (side + 6), ROWS * (side + 20)), "white")
        for place, number in enumerate(range(start, min(start + COLUMNS * ROWS, len(sources)))):
            x, y = place % COLUMNS * (side + 6), place // COLUMNS * (side + 20)
            with Image.open(out / "images" / f"{number:03d}.png") as image:
                sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y + 14))
            ImageDraw.Draw(sheet).text((x + 2, y + 1), str(number), fill="black")
        write_image(out / f"sheet-{start // (COLUMNS * ROWS)}.png", sheet)


def compare(out: Path, labels: Path, docs: Path) -> None:
    """Agreement of either judge with the labels, over all images and over those of erased models."""
    with labels.open(newline="") as file:
        given = {int(row["number"]): row["label"] for row in csv.DictReader(file)}
    key = read_json(out / "key.json")
    images = []
    for number in sorted(given):
        with Image.open(out / "images" / f"{number:03d}.png") as image:
            images.append(image.convert("RGB"))
    summary: dict[str, object] = {"n": len(given), "world_digest": world_digest()}
    for role in ("score", "curate"):
        verdicts = [verdict.label for verdict in Toybox(hazard="fire", role=role)(images)]
        rows = list(zip(sorted(given), verdicts, strict=True))
        for name, chosen in (
            ("all", rows),
            ("erased", [row for row in rows if key[str(row[0])]["model"] != "original"]),
        ):
            agreed = sum(given[number] == label for number, label in chosen)
            interval = wilson(agreed, len(chosen))
            confusion = Counter(f"{given[number]} judged {label}" for number, label in chosen)
            summary[f"{role}, {name}"] = {
                "agreement": agreed / len(chosen),
                "low": interval.low,
                "high": interval.high,
                "n": len(chosen),
                "confusion": dict(sorted(confusion.items())),
            }
    write_json(docs / "agreement.json", summary)
    print(json.dumps(summary, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("draw", "compare"))
    parser.add_argument("--tune", type=Path, default=Path("runs/tune"))
    parser.add_argument("--out", type=Path, default=Path("runs/agreement"))
    parser.add_argument("--labels", type=Path, default=Path("docs/results/labels.csv"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.step == "draw":
        draw(given.tune, given.out)
    else:
        compare(given.out, given.labels, given.docs)


if __name__ == "__main__":
    main()
