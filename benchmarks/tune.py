"""Choose the values of a method on the embedded model, every trial recorded: a random search with successive halving
of which the later trials are written by hand (`REFINED`), and two more searches by hand (`SECOND`, `THIRD`).

    python benchmarks/tune.py --out runs/tune

Only the concept's *validation* prompts and seeds are used, and the *curating* judge; the scored prompts, seeds and
judge are never seen. Two families share the budget alike: `published` (DUO's objective, LoRA on self-attention)
and `best` (any scope, DPO-Positive's penalty allowed). The objective and the space of `draw` were written before the
first trial; the trials by hand leave that space (docs/search.md). A trial that is stopped goes on where it was;
finished trials are read back from `trials.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from duo import UserError, load_concept, load_recipe
from duo.methods.duo import Duo
from duo.metrics.toybox_attributes import ToyboxAttributes
from duo.metrics.toybox_lpips import ToyboxLpips
from duo.models import load_family
from duo.pairs import Pairs
from duo.plugins import Sampling
from duo.rundir import StageRun, append_jsonl, read_json, read_jsonl, write_image, write_json
from duo.stages import Session, make_pairs
from duo.toybox import world_digest

SEED = 7
STEPS = (60, 150, 300, 450)
RUNGS = {  # family → how many trials get to each of STEPS
    "published": (6, 0, 0, 0),
    "best": (12, 0, 0, 0),
    "refined": (8, 8, 2, 1),
    "refined-published": (3, 3, 1, 0),
}
# Written after the first rung of the two families that are drawn: that rung told that λ must be small for anything to
# happen soon, that the wide scope keeps unrelated scenes best, and that 60 steps are too few to rank what is left. The
# pictures of the first two refined trials showed discoloured flames in place: layout is decided at high noise, so the
# lower end of the timestep range joined the space.
_WIDE = {"beta": 20.0, "learning_rate": 1e-3, "prior_weight": 100.0, "rank": 16, "pair_timesteps": "shared"}
_WIDE |= {"targets": ["self_attention", "feed_forward", "convolutions"], "timestep_range": [0.0, 1.0]}
_WIDE |= {"positive_penalty": 3.0}
_NARROW = {**_WIDE, "targets": ["self_attention"], "positive_penalty": 0.0, "rank": 32}
REFINED = {
    "refined": (
        _WIDE,
        {**_WIDE, "positive_penalty": 1.0},
        {**_WIDE, "timestep_range": [0.4, 1.0]},
        {**_WIDE, "timestep_range": [0.4, 1.0], "positive_penalty": 1.0},
        {**_WIDE, "timestep_range": [0.6, 1.0], "beta": 10.0},
        {**_WIDE, "beta": 10.0, "prior_weight": 30.0},
        {**_WIDE, "timestep_range": [0.4, 1.0], "positive_penalty": 10.0, "prior_weight": 30.0},
        {**_WIDE, "timestep_range": [0.4, 1.0], "learning_rate": 5e-4},
    ),
    "refined-published": (
        {**_NARROW, "beta": 28.0, "learning_rate": 5e-4},
        {**_NARROW, "timestep_range": [0.4, 1.0]},
        {**_NARROW, "timestep_range": [0.4, 1.0], "beta": 50.0, "prior_weight": 300.0},
    ),
}
# The second search: judges that know what erasing leaves (so that *corrupted* says what the eye says), pairs in which
# near misses stay, and rates that decay. Each is (steps, configuration); docs/search.md has the reasons.
_DECAY = {**_WIDE, "timestep_range": [0.4, 1.0], "learning_rate": 5e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 20}
# Four pairs a step leave the direction of the erasure to chance; sixteen average over noise and timesteps.
_LARGE = {**_DECAY, "learning_rate": 1e-3, "timestep_range": [0.3, 1.0], "train_batch_size": 16}
SECOND = (
    (300, _DECAY),
    (300, {**_DECAY, "positive_penalty": 10.0}),
    (300, {**_DECAY, "learning_rate": 1e-3}),
    (300, {**_DECAY, "learning_rate": 1e-3, "beta": 5.0}),
    (300, {**_DECAY, "learning_rate": 1e-3, "positive_penalty": 1.0, "prior_weight": 300.0}),
    (300, {**_DECAY, "learning_rate": 1e-3, "positive_penalty": 1.0, "beta": 50.0}),
    (300, {**_DECAY, "learning_rate": 1e-3, "positive_penalty": 1.0, "timestep_range": [0.5, 1.0]}),
    (120, _LARGE),
    (100, {**_LARGE, "train_batch_size": 32}),
    (240, _LARGE),
    (150, {**_LARGE, "beta": 50.0}),
    (120, {**_LARGE, "beta": 50.0, "prior_weight": 300.0, "targets": ["self_attention"], "positive_penalty": 0.0}),
    (120, {**_LARGE, "positive_penalty": 1.0}),
    (120, {**_LARGE, "prior_weight": 10.0}),
    (120, {**_LARGE, "targets": ["self_attention"], "positive_penalty": 0.0}),
)
# The three best of the second search once more, at the recipe's own seed and on its own pairs: what chose the demo's.
THIRD = (
    (120, {**_LARGE, "prior_weight": 10.0}),
    (120, _LARGE),
    (100, {**_LARGE, "train_batch_size": 32}),
)
IMAGES = 30  # of each validation set
PAIRS = ("pairs-run", "pairs-run-recipe")  # of the trials, and of the third search
DIVERGED = 10.0  # the objective of a trial that diverged: above any that can be measured
SETS = ("plain", "held_out_words", "held_out_subjects")
SCOPES = (
    ("self_attention",),
    ("self_attention", "feed_forward"),
    ("self_attention", "feed_forward", "convolutions"),
)


def draw(family: str, rng: np.random.Generator) -> dict[str, Any]:
    """One configuration of the space."""
    best = family == "best"
    return {
        "beta": round(float(np.exp(rng.uniform(np.log(5), np.log(200)))), 1),
        "learning_rate": float(f"{np.exp(rng.uniform(np.log(3e-4), np.log(2e-3))):.1e}"),
        "prior_weight": float(f"{np.exp(rng.uniform(np.log(1e1), np.log(1e5))):.1e}"),
        "rank": int(rng.choice((8, 16, 32))),
        "pair_timesteps": str(rng.choice(("shared", "independent"))),
        "timestep_range": [0.0, float(rng.choice((0.75, 1.0)))],
        "targets": list(SCOPES[rng.integers(len(SCOPES))] if best else SCOPES[0]),
        "positive_penalty": float(rng.choice((1.0, 3.0, 10.0, 30.0))) if best else 0.0,
    }


def objective(seen: dict[str, float], base: dict[str, float]) -> float:
    """Lower is better: what is left of the concept, what is spoiled, what is lost elsewhere, as shares of images."""
    return (
        seen["detected"]
        + seen["corrupted"]
        + 2 * max(0.0, base["unrelated_attributes"] - seen["unrelated_attributes"])
        + 0.5 * max(0.0, base["unrelated_attributes"] - seen["unsafe_attributes"])
        + (1 - seen["preservation"])
    )


def look(
    model: Any,
    concept: Any,
    sampling: Sampling,
    references: list[Any] | None,
    *,
    sets: tuple[str, ...] = SETS,
    images_each: int = IMAGES,
) -> tuple[dict[str, float], list[Any]]:
    """Render the validation sets and measure them; also returns the unrelated images."""
    judge = concept.curator.make("judges", "curator")
    labels: list[str] = []
    unsafe, unrelated = ToyboxAttributes(), ToyboxAttributes()
    for index, name in enumerate(sets):
        prompts = concept.prompt_set(name, validation=True)[:images_each]
        images = model.generate(prompts, seeds=[5000 * index + i for i in range(len(prompts))], sampling=sampling)
        labels += [verdict.label for verdict in judge(images)]
        unsafe.update(images=images, references=None, prompts=prompts)
    prompts = concept.prompt_set("unrelated", validation=True)[:images_each]
    images = model.generate(prompts, seeds=[50_000 + i for i in range(len(prompts))], sampling=sampling)
    unrelated.update(images=images, references=None, prompts=prompts)
    distance = ToyboxLpips()
    distance.update(images=images, references=references or images, prompts=prompts)
    return {
        "detected": labels.count("present") / len(labels),
        "corrupted": labels.count("corrupted") / len(labels),
        "unsafe_attributes": float(np.mean(unsafe.compute())),
        "unrelated_attributes": float(np.mean(unrelated.compute())),
        "preservation": float(np.mean(distance.compute())),
    }, images


def reference(
    out: Path, model: Any, concept: Any, sampling: Sampling, **looked_at: Any
) -> tuple[dict[str, float], list[Any]]:
    """The original model's numbers and its unrelated images, measured once."""
    folder = out / "reference"
    if not (folder / "seen.json").exists():
        seen, images = look(model, concept, sampling, None, **looked_at)
        for index, image in enumerate(images):
            write_image(folder / f"{index:04d}.png", image)
        write_json(folder / "seen.json", seen)
    images = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return read_json(folder / "seen.json"), images


def trial(out: Path, model_name: str, family: str, number: int, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train one configuration to `steps`, going on from its last rung, and measure it.

    Trials of the family "third" have the recipe's own pairs and its plain seed, which is not the one that a run derives
    for its training.
    """
    torch.set_num_threads(1)
    recipe, concept = load_recipe("toybox-fire"), load_concept("toybox-fire")
    model = load_family(model_name, device="cpu")
    base, references = reference(out, model, concept, recipe.sampling)
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    method = Duo(**settings, max_train_steps=steps, checkpointing_steps=50)
    folder = out / f"{family}-{number:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    third = family == "third"
    run = StageRun(folder=folder, seed=recipe.seed if third else SEED, device=model.device)
    record: dict[str, Any] = {"family": family, "trial": number, "steps": steps, "config": config, "model": model_name}
    delta = method.erase(model, concept, pairs=Pairs.read(out / PAIRS[third] / "pairs"), run=run)
    delta.save(folder / "delta.safetensors")
    with delta.attached(model):
        seen, _ = look(model, concept, recipe.sampling, references)
    return {**record, **seen, "objective": objective(seen, base), "base": base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--model", default="toybox", help="the embedded model, or a folder")
    parser.add_argument("--only", choices=("first", "second", "third"), help="of the three searches")
    given = parser.parse_args()
    for folder, seed in zip(PAIRS, (["seed=1000"], []), strict=True):
        recipe = load_recipe("toybox-fire", overrides=[*seed, f"model={json.dumps(given.model)}"])
        session = Session(recipe, given.out / folder)
        make_pairs(session)
    reference(given.out, session.model, session.concept, recipe.sampling)
    log = given.out / "trials.jsonl"
    done = {(row["family"], row["trial"], row["steps"]): row for row in read_jsonl(log, appended=True)}
    space = drawn_space()
    alive = {family: list(range(rungs[0])) for family, rungs in RUNGS.items()}
    with ProcessPoolExecutor(given.workers) as pool:
        for rung, steps in enumerate(STEPS) if given.only in (None, "first") else ():
            for family in space if rung else ():
                if RUNGS[family][rung] < len(alive[family]):
                    alive[family].sort(key=lambda n: done[family, n, STEPS[rung - 1]]["objective"])
                    alive[family] = alive[family][: RUNGS[family][rung]]
            # The refined trials are all trained to the second rung, so the first need not be measured.
            measured = [family for family in space if rung or family not in REFINED]
            todo = [(family, n, space[family][n], steps) for family in measured for n in alive[family]]
            measure(pool, todo, given, log, done)
        for family, trials in (("second", SECOND), ("third", THIRD)):
            if given.only in (None, family):
                todo = [(family, n, config, steps) for n, (steps, config) in enumerate(trials)]
                measure(pool, todo, given, log, done)
    for family in {key[0] for key in done}:
        finished = [row for key, row in done.items() if key[0] == family]
        print(family, json.dumps(min(finished, key=lambda row: row["objective"]), sort_keys=True))


def drawn_space() -> dict[str, list[dict[str, Any]]]:
    """Family → the configurations of the first search."""
    rng = np.random.default_rng(SEED)
    space = {family: [draw(family, rng) for _ in range(12)] for family in ("published", "best")}
    return space | {family: list(configs) for family, configs in REFINED.items()}


def measure(
    pool: ProcessPoolExecutor,
    todo: list[tuple[str, int, dict[str, Any], int]],
    given: argparse.Namespace,
    log: Path,
    done: dict[tuple[str, int, int], dict[str, Any]],
) -> None:
    """Run the trials (family, number, configuration, steps) that are not `done`, and record each."""
    futures = {
        (family, number, steps): (config, pool.submit(trial, given.out, given.model, family, number, config, steps))
        for family, number, config, steps in todo
        if (family, number, steps) not in done
    }
    for (family, number, steps), (config, future) in futures.items():
        try:
            row = future.result()
        except UserError as error:  # a diverged trial is a result: the worst one
            row = {"family": family, "trial": number, "steps": steps, "config": config}
            row |= {"objective": DIVERGED, "error": str(error)}
        row["world_digest"] = world_digest()
        done[family, number, steps] = row
        append_jsonl(log, row)
        told = {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}
        print(family, number, steps, told, flush=True)


if __name__ == "__main__":
    main()
