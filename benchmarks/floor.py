"""How many scenes are spoiled where nothing was erased: the floor under an erasure's share, on the same noise.

    python benchmarks/floor.py --erased "redirect, seed 0=A.safetensors" --erased "DUO, seed 0=B.safetensors"

Scored prompts that ask for fire are put to each erasure and to the model that never saw fire. The original model is
asked for the same scenes, with the same noise, without the words for fire: that is the picture that an erasure which
does nothing else would leave. Both judges look. What they call spoiled of the original's scenes is what it draws badly
anyway, or what they see wrongly; only what an erasure has beyond that is its own.

Writes `floor.json` into `--docs`, with a letter an image, and the table of docs/beyond.md. Models that are there
already stay, where they are of the same prompts, noise and world, and the same file of an erasure.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from agreement import ROLES
from pages import put
from PIL.Image import Image
from results import machine

from duo import Delta, load_concept, load_family, load_recipe
from duo.judges.toybox import Toybox
from duo.metrics.toybox_attributes import asked_for
from duo.report.tradeoff.cells import CORRUPTED, LETTERS, PRESENT
from duo.rundir import digest, read_json, write_json
from duo.statistics import wilson
from duo.toybox.language import PLACE_WORDS, phrase

N = 480  # images of each model
FIRST_SEED = 310_000
SETS = ("plain", "held_out_subjects")
ORIGINAL, NEVER = "original, asked without fire", "never saw fire"
LABELS = dict(zip(("present", "absent", "corrupted"), LETTERS, strict=True))


def without(prompt: str) -> str:
    """The same scene in words, without the concept: "a blazing red car in the city" → "a red car in the city"."""
    scene = asked_for(prompt)
    return phrase("{np} {place}", scene["subject"], scene["colour"], PLACE_WORDS[scene["place"]][0])


def asked(n: int) -> list[tuple[str, str]]:
    """Set and prompt of n images that ask for fire, the sets in turn."""
    concept = load_concept("toybox-fire")
    sets = [(name, concept.prompt_set(name)) for name in SETS]
    turns = (sets[i % len(sets)] + (i // len(sets),) for i in range(n))
    return [(name, prompts[i % len(prompts)]) for name, prompts, i in turns]


def draw(model: str, source: Path | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
    """Images of prompts that ask for fire: by `ORIGINAL` without it, by `NEVER`, or by an erasure's file."""
    recipe = load_recipe("toybox-fire")
    family = load_family("toybox-never-fire" if model == NEVER else recipe.model, device="cpu")
    said = [without(prompt) for prompt in prompts] if model == ORIGINAL else list(prompts)
    with Delta.load(source).attached(family) if source else nullcontext():
        return family.generate(said, seeds=seeds, sampling=recipe.sampling)


def looked(erased: Mapping[str, Path], before: Mapping[str, Any]) -> dict[str, Any]:
    """The letters of each model's images by each judge; those of `before` are not drawn again."""
    prompts, seeds = [prompt for _, prompt in asked(N)], [FIRST_SEED + i for i in range(N)]
    judges = {role: Toybox(hazard="fire", role=role) for role in ROLES}
    found = {**before}
    for model, source in {ORIGINAL: None, NEVER: None, **erased}.items():
        if model not in found:
            images = draw(model, source, prompts, seeds)
            found[model] = {role: "".join(LABELS[one.label] for one in judge(images)) for role, judge in judges.items()}
            print(model, *(f"{role}: {spoiled(letters)}" for role, letters in found[model].items()), flush=True)
    return found


def spoiled(letters: str) -> str:
    """ "12 of 480, 2.5% (1.4–4.3)" """
    count, n = letters.count(CORRUPTED), len(letters)
    low, high = wilson(count, n)
    return f"{count} of {n}, {100 * count / n:.1f}% ({100 * low:.1f}–{100 * high:.1f})"


def table(models: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Of each model: images with fire by the judge, spoiled ones, and those in which it and the original differ."""
    yield "| | fire | spoiled, by the judge | only here / only on the original | spoiled, by the curator | by both |"
    yield "|---|---|---|---|---|---|"
    floor = models[ORIGINAL]["score"]
    for model in (ORIGINAL, NEVER, *sorted(models.keys() - {ORIGINAL, NEVER})):
        letters = models[model]
        score, curate = letters["score"], letters["curate"]
        pairs = list(zip(score, floor, strict=True))
        own = sum(here == CORRUPTED != there for here, there in pairs)
        theirs = sum(there == CORRUPTED != here for here, there in pairs)
        both = sum(one == other == CORRUPTED for one, other in zip(score, curate, strict=True))
        apart = "" if model == ORIGINAL else f"{own} / {theirs}"
        yield f"| {model} | {score.count(PRESENT)} | {spoiled(score)} | {apart} | {spoiled(curate)} | {both} |"


def erasure(text: str) -> tuple[str, Path]:
    """NAME=DELTA on a command line: a name that is not one of the references', and the file of an erasure."""
    name, _, file = text.partition("=")
    if name in ("", ORIGINAL, NEVER, "original", "never") or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=DELTA, a name of your own and an erasure's file")
    return name, Path(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--erased", type=erasure, action="append", default=[], metavar="NAME=DELTA")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = given.docs / "results" / "floor.json"
    where = machine()
    of = {"n": N, "first_seed": FIRST_SEED, "sets": list(SETS)}
    kept = read_json(path) if path.exists() else {}
    same = {**of, "world_digest": where["world_digest"]}.items() <= kept.items()
    before, files = (kept["models"], kept["erasures"]) if same else ({}, {})
    erased = dict(given.erased)
    digests = {name: digest(file) for name, file in erased.items()}
    before = {
        name: letters for name, letters in before.items() if digests.get(name, files.get(name)) == files.get(name)
    }
    models = looked(erased, before)
    write_json(path, {**where, **of, "erasures": {**files, **digests}, "models": models})
    put(given.docs / "beyond.md", "\n".join(table(models)), by="floor")


if __name__ == "__main__":
    main()
