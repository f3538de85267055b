"""Give every method the same search on the embedded model, then compare what it found: `docs/methods/README.md`.

    python benchmarks/methods.py tune --out runs/methods      # the same trials and core-minutes for each method
    python benchmarks/methods.py compare --out runs/methods   # the shipped recipes on the scored prompts, with costs

The space, the objective and the budget below were written before the first trial. Only validation prompts and seeds are
used, and the curating judge; no attack takes part. Every method is told the same words, those of the concept file. The
pairs' prompts are made of them and of two phrases more (burning down, engulfed in flames), which DUO sees, and so does
a rival whose `prompts`, `concept_text` or `captions` is "prompts"; the other routes to the concept are held out for
all. A method has two spaces. In `SPACES` the first configuration is a first guess from a few tries by hand; in
`PUBLISHED`, which came later, it is the published form with its rate and its counts cut to a small model and `SECONDS`.
The other trials are drawn over the first one. The `FINALISTS` best are trained again with `FINAL_SEEDS`, and the mean
over the seeds chooses. A trial may train for `SECONDS` of one core at most: its steps are cut to what it can take in
that time, and that number is what is recorded. What is finished is read back from `trials.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import machine, take
from tune import look, objective, reference

from duo import Session, UserError, load_concept, load_recipe
from duo.fields import LeafConfig
from duo.models import load_family
from duo.pairs import Pairs
from duo.rundir import StageRun, append_jsonl, read_json, read_jsonl, write_json
from duo.seeds import seed_for
from duo.stages import attack, erase, make_pairs, score
from duo.toybox import world_digest

TRIALS = {"first": 5, "published": 3}  # of each method, in each of its spaces
SECONDS = 120.0  # of one core that a trial may train for
SEED = 11
FINALISTS = 2
FINAL_SEEDS = (12,)
PROBE = 10  # steps that tell what one costs: those of ESD end where chance has it
LOOKED_AT: dict[str, Any] = {"sets": ("plain",), "images_each": 48}
DIVERGED = 10.0  # the objective of a trial that diverged
ROWS = ("prompts", "prompts_held_out_words", "prompts_held_out_subjects")
IMAGES = 120  # a row of the comparison

Draw = Callable[[np.random.Generator], Any]


def choice(*values: Any) -> Draw:
    return lambda rng: values[int(rng.integers(len(values)))]


def log_uniform(low: float, high: float) -> Draw:
    return lambda rng: float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.1e}")


# Method → its first configuration, and the ranges that the other trials are drawn from, over that one.
SPACES: dict[str, tuple[dict[str, Any], dict[str, Draw]]] = {
    "duo": (
        {
            "beta": 20.0,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 5,
            "prior_weight": 100.0,
            "rank": 16,
            "max_train_steps": 60,
            "train_batch_size": 16,
            "targets": ["self_attention"],
            "timestep_range": [0.3, 1.0],
            "pair_timesteps": "shared",
        },
        {
            "beta": log_uniform(10, 100),
            "learning_rate": log_uniform(5e-4, 2e-3),
            "prior_weight": log_uniform(10, 1000),
            "train_batch_size": choice(8, 16),
            "targets": choice(["self_attention"], ["self_attention", "feed_forward", "convolutions"]),
            "positive_penalty": choice(0.0, 1.0, 3.0),
        },
    ),
    "esd": (
        {
            "variant": "u",
            "prompts": "prompts",
            "base": "anchor",
            "eta": 0.5,
            "sampling_steps": 10,
            "learning_rate": 1e-4,
            "lr_scheduler": "cosine",
            "max_train_steps": 400,
        },
        {
            "variant": choice("u", "full", "x"),
            "base": choice("unconditional", "anchor"),
            "prompts": choice("words", "prompts"),
            "eta": choice(0.0, 0.5, 1.0, 2.0),
            "learning_rate": log_uniform(5e-5, 3e-4),
            "train_batch_size": choice(1, 2, 4),
        },
    ),
    "ca": (
        {
            "prompts": "prompts",
            "parameters": "full",
            "teacher": "frozen",
            "prior_weight": 0.3,
            "guidance_scale": 3.5,
            "images": 64,
            "train_batch_size": 8,
            "learning_rate": 2e-4,
            "lr_scheduler": "cosine",
            "max_train_steps": 200,
            "negative_words": False,
            "horizontal_flip": False,
        },
        {
            "parameters": choice("full", "attention", "cross_attention"),
            "teacher": choice("frozen", "current"),
            "prior_weight": choice(0.0, 0.3, 1.0),
            "prompts": choice("words", "prompts"),
            "learning_rate": log_uniform(5e-5, 1e-3),
        },
    ),
    "fmn": (
        {
            "parameters": "cross_attention",
            "captions": "prompts",
            "use_pooler": False,
            "inversion_steps": 0,
            "images": 40,
            "train_batch_size": 8,
            "learning_rate": 1e-4,
            "max_train_steps": 100,
        },
        {
            "learning_rate": log_uniform(5e-5, 1.5e-4),
            "max_train_steps": choice(50, 70, 90, 120),
            "captions": choice("prompts", "template"),
            "use_pooler": choice(False, True),
        },
    ),
    "sa": (
        {
            "concept_text": "prompts",
            "parameters": "full",
            "ewc_weight": 1e-4,
            "learning_rate": 1e-4,
            "max_train_steps": 40,
            "train_batch_size": 8,
            "surrogate_images": 64,
            "replay_images": 64,
            "fisher_samples": 12,
            "fisher_timesteps": 16,
        },
        {
            "learning_rate": log_uniform(5e-5, 3e-4),
            "max_train_steps": choice(40, 80, 120),
            "ewc_weight": log_uniform(1e-5, 1.0),
            "concept_text": choice("words", "prompts"),
            "parameters": choice("full", "noxattn"),
        },
    ),
    "spm": (
        {
            "prompts": "prompts",
            "neutral": "anchor",
            "anchoring": "harmless",
            "anchor_weight": 10.0,
            "grid_steps": 8,
            "train_batch_size": 2,
            "learning_rate": 2e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 5,
            "max_train_steps": 120,
        },
        {
            "learning_rate": log_uniform(1e-3, 5e-3),
            "anchor_weight": log_uniform(1, 100),
            "eta": choice(0.0, 0.5, 1.0),
            "train_batch_size": choice(2, 4),
            "anchoring": choice("random", "harmless"),
        },
    ),
    "uce": (
        {"preserve_harmless": True},
        {
            "regularization": log_uniform(0.03, 2),
            "preserve_scale": log_uniform(0.03, 1),
            "erase_scale": log_uniform(1, 5),
            "tokens": choice("last", "from_last"),
            "preserve_tokens": choice("from_last", "all"),
            "preserve_harmless": choice(False, True),
        },
    ),
}


# The same for the published form: every value that is not named is the one of the method's class, its authors'.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Draw]]] = {
    "duo": (
        {"beta": 30.0, "learning_rate": 1e-3, "prior_weight": 100.0, "train_batch_size": 16, "max_train_steps": 100},
        {
            "beta": log_uniform(5, 100),
            "learning_rate": log_uniform(3e-4, 2e-3),
            "lr_scheduler": choice("constant", "cosine"),
            "prior_weight": log_uniform(10, 1000),
            "train_batch_size": choice(16, 32),
            "targets": choice(["self_attention"], ["self_attention", "feed_forward", "convolutions"]),
            "pair_timesteps": choice("independent", "shared"),
            "timestep_range": choice([0.0, 0.75], [0.3, 1.0]),
            "positive_penalty": choice(0.0, 1.0),
        },
    ),
    "esd": (
        {"learning_rate": 1e-4, "sampling_steps": 10, "max_train_steps": 400},
        {
            "variant": choice("u", "full", "x", "x-strict", "selfattn"),
            "prompts": choice("words", "prompts"),
            "base": choice("unconditional", "anchor"),
            "eta": choice(0.0, 0.5, 1.0),
            "learning_rate": log_uniform(2e-5, 3e-4),
            "lr_scheduler": choice("constant", "cosine"),
            "train_batch_size": choice(1, 2),
        },
    ),
    "ca": (
        {"images": 64, "learning_rate": 2e-4, "max_train_steps": 200},
        {
            "parameters": choice("attention", "cross_attention", "full"),
            "teacher": choice("current", "frozen"),
            "prompts": choice("words", "prompts"),
            "prior_weight": choice(0.0, 1.0),
            "guidance_scale": choice(3.5, 6.0),
            "negative_words": choice(True, False),
            "learning_rate": log_uniform(5e-5, 1e-3),
        },
    ),
    "uce": (
        {"anchor": ""},
        {
            "anchor": choice("", None),
            "technique": choice("replace", "tensor"),
            "tokens": choice("last", "from_last"),
            "regularization": log_uniform(0.03, 2),
            "preserve_scale": log_uniform(0.03, 1),
            "erase_scale": log_uniform(1, 5),
            "preserve_harmless": choice(False, True),
        },
    ),
    "spm": (
        {"learning_rate": 2e-3, "lr_warmup_steps": 20, "grid_steps": 8, "train_batch_size": 2, "max_train_steps": 120},
        {
            "prompts": choice("words", "prompts"),
            "neutral": choice("empty", "anchor"),
            "eta": choice(0.5, 1.0),
            "anchor_weight": log_uniform(10, 1000),
            "learning_rate": log_uniform(5e-4, 5e-3),
        },
    ),
    "fmn": (
        {"learning_rate": 2e-5, "inversion_steps": 200, "max_train_steps": 70},
        {
            "learning_rate": log_uniform(1e-5, 1e-4),
            "max_train_steps": choice(35, 70),
            "captions": choice("template", "prompts"),
            "inversion_steps": choice(0, 200),
            "images": choice(10, 40),
            "train_batch_size": choice(1, 4),
            "parameters": choice("full", "cross_attention"),
            "use_pooler": choice(True, False),
        },
    ),
    "sa": (
        {
            "surrogate_images": 64,
            "replay_images": 64,
            "fisher_samples": 12,
            "fisher_timesteps": 16,
            "train_batch_size": 8,
            "max_train_steps": 120,
        },
        {
            "parameters": choice("noxattn", "full"),
            "concept_text": choice("words", "prompts"),
            "ewc_weight": log_uniform(1e-3, 50),
            "replay_weight": choice(1.0, 3.0),
            "learning_rate": log_uniform(5e-5, 3e-4),
            "max_train_steps": choice(80, 120),
        },
    ),
}


def configurations(method: str) -> list[dict[str, Any]]:
    """The trials of a method, in their order; the same at every call."""
    trials = []
    for space, spaces in (("first", SPACES), ("published", PUBLISHED)):
        first, ranges = spaces[method]
        rng = np.random.default_rng(seed_for(SEED, method, *([space] if space != "first" else [])))
        drawn = ({name: draw(rng) for name, draw in ranges.items()} for _ in range(TRIALS[space] - 1))
        trials += [first, *({**first, **one} for one in drawn)]
    return trials


def made(method: str, config: dict[str, Any]) -> Any:
    return LeafConfig(name=method, settings=config).make("methods", f"trial of {method}")


class Meter:
    """Rows that the denoiser was given, while a context lasts."""

    def __init__(self) -> None:
        self.rows = 0

    @contextmanager
    def on(self, denoiser: Any) -> Iterator[None]:
        def count(_module: Any, arguments: Any, named: Any) -> None:
            self.rows += len(arguments[0] if arguments else named["hidden_states"])

        hook = denoiser.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True, kw_only=True)
class Stopwatch(StageRun):
    """A run that keeps the core-seconds at which each step was logged."""

    times: list[float] = field(default_factory=list)

    def log(self, **numbers: float | int | str) -> None:
        self.times.append(time.process_time())
        super().log(**numbers)


def affordable(method: Any, model: Any, concept: Any, pairs: Pairs, folder: Path) -> int | None:
    """The steps that fit into `SECONDS`, from all but the first of a short try; None of a method without."""
    if not hasattr(method, "max_train_steps"):
        return None
    run = Stopwatch(
        folder=folder / "probe", seed=SEED, device=model.device, sampling=load_recipe("toybox-fire").sampling
    )
    began = time.process_time()
    replace(method, max_train_steps=PROBE).erase(model, concept, pairs=pairs if method.takes_pairs else None, run=run)
    first, last = run.times[-PROBE], run.times[-1]
    step, before = (last - first) / (PROBE - 1), first - began
    return max(1, int((SECONDS - before) / step))


def trial(out: Path, name: str, number: int, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration for as long as it may, and look at what it draws."""
    torch.set_num_threads(1)
    recipe, concept = load_recipe("toybox-fire"), load_concept("toybox-fire")
    model = load_family("toybox", device="cpu")
    base, references = reference(out, model, concept, recipe.sampling, **LOOKED_AT)
    pairs = Pairs.read(out / "pairs-run" / "pairs")
    folder = out / (f"{name}-{number:02d}" + (f"-seed-{seed}" if seed != SEED else ""))
    method = made(name, config)
    steps = affordable(method, model, concept, pairs, folder) if seed == SEED else None
    if steps is not None:
        config = {**config, "max_train_steps": min(method.max_train_steps, steps)}
        method = made(name, config)
    run = StageRun(folder=folder, seed=seed, device=model.device, sampling=recipe.sampling)
    meter, began = Meter(), time.process_time()
    with meter.on(model.denoiser):
        delta = method.erase(model, concept, pairs=pairs if method.takes_pairs else None, run=run)
    seconds = time.process_time() - began
    delta.save(folder / "delta.safetensors")
    with delta.attached(model):
        seen, _ = look(model, concept, recipe.sampling, references, **LOOKED_AT)
    record = {"method": name, "trial": number, "seed": seed, "config": config}
    record |= {"core_seconds": round(seconds, 1), "rows": meter.rows}
    return {**record, **seen, "objective": objective(seen, base), "base": base}


def tune(out: Path, workers: int, only: list[str]) -> None:
    """All trials of all methods, or of some."""
    concept = load_concept("toybox-fire")
    session = Session(load_recipe("toybox-fire", overrides=["seed=1000"]), out / "pairs-run")
    make_pairs(session)
    reference(out, session.model, concept, session.recipe.sampling, **LOOKED_AT)
    log, methods = out / "trials.jsonl", only or list(SPACES)
    with ProcessPoolExecutor(workers, max_tasks_per_child=1) as pool:
        numbers = range(sum(TRIALS.values()))
        measure(pool, out, log, {(name, n, SEED): configurations(name)[n] for n in numbers for name in methods})
        finals = {name: best(log, name) for name in methods}  # trained as long as they were the first time
        measure(
            pool,
            out,
            log,
            {
                (name, row["trial"], seed): row["config"]
                for name, rows in finals.items()
                for row in rows
                for seed in FINAL_SEEDS
            },
        )
    for name in methods:
        print(json.dumps(chosen(log, name), sort_keys=True))
    print(trials_table(log, methods))


def measure(
    pool: ProcessPoolExecutor, out: Path, log: Path, wanted: dict[tuple[str, int, int], dict[str, Any]]
) -> None:
    """Run the trials (method, number, seed) that the log does not have, and record each."""
    done = {(row["method"], row["trial"], row["seed"]) for row in read_jsonl(log, appended=True)}
    futures = {key: pool.submit(trial, out, *key, config) for key, config in wanted.items() if key not in done}
    for (name, number, seed), future in futures.items():
        try:
            row = future.result()
        except UserError as error:  # a diverged trial is a result: the worst one
            row = {"method": name, "trial": number, "seed": seed, "config": wanted[name, number, seed]}
            row |= {"objective": DIVERGED, "error": str(error)}
        append_jsonl(log, {**row, "world_digest": world_digest()})
        told = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
        print(name, number, seed, told, flush=True)


def best(log: Path, name: str) -> list[dict[str, Any]]:
    """The trials of a method that are trained again."""
    rows = [row for row in read_jsonl(log, appended=True) if row["method"] == name and row["seed"] == SEED]
    return sorted(rows, key=lambda row: row["objective"])[:FINALISTS]


def chosen(log: Path, name: str) -> dict[str, Any]:
    """The finalist with the lowest mean of the objective over all seeds."""
    rows = [row for row in read_jsonl(log, appended=True) if row["method"] == name]
    finalists = [
        {
            **{key: first[key] for key in ("method", "trial", "config")},
            "objective": float(np.mean([row["objective"] for row in rows if row["trial"] == first["trial"]])),
        }
        for first in best(log, name)
    ]
    return min(finalists, key=lambda row: row["objective"])


def trials_table(log: Path, methods: list[str]) -> str:
    """All trials as a Markdown table; the second objective is that of the second seed, and the chosen trial is bold."""
    rows = list(read_jsonl(log, appended=True))
    lines = [
        "| method | trial | what differs from the first of its space | steps | core-seconds | detected | spoiled "
        "| attributes, unrelated | preservation | objective | second seed |",
        "|---" * 11 + "|",
    ]
    for name in methods:
        own = {row["trial"]: row for row in rows if row["method"] == name and row["seed"] == SEED}
        best_one = chosen(log, name)
        again = {row["trial"]: row["objective"] for row in rows if row["method"] == name and row["seed"] != SEED}
        for number, row in sorted(own.items()):
            space, start = (SPACES, 0) if number < TRIALS["first"] else (PUBLISHED, TRIALS["first"])
            first = space[name][0]
            differs = {
                key: row["config"].get(key) for key in space[name][1] if row["config"].get(key) != first.get(key)
            }
            said = ", ".join(f"`{key}` {_said(value)}" for key, value in differs.items() if key in row["config"])
            if number == start:
                said = "the first guess" if space is SPACES else "the published form"
            bold = "**" if number == best_one["trial"] else ""
            shares = [
                f"{row[key]:.0%}" if key in row else "–" for key in ("detected", "corrupted", "unrelated_attributes")
            ]
            cells = [
                name,
                f"{bold}{number}{bold}",
                said,
                str(row["config"].get("max_train_steps", "–")),
                f"{row.get('core_seconds', 0):.0f}",
                *shares,
                f"{row['preservation']:.3f}" if "preservation" in row else "–",
                f"{row['objective']:.3f}",
                f"{again[number]:.3f}" if number in again else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- the comparison ---------------------------------------------------------------------------------


def recipes(only: list[str]) -> dict[str, str]:
    """Method → the recipe that ships the best of its trials."""
    return {name: f"toybox-fire-{name}" for name in only or SPACES}


def compared(out: Path, method: str, name: str) -> dict[str, Any]:
    """One recipe on the scored prompts, without attacks, and what the erasure cost (pairs of images included).

    The cost is None where the erasure was stopped and gone on with: nobody measured the whole of it.
    """
    torch.set_num_threads(1)
    recipe = load_recipe(name, overrides=[f"score.unrelated={IMAGES}"])
    rows = tuple(replace(row, images=IMAGES) for row in recipe.attacks if row.row in ROWS)
    session = Session(replace(recipe, attacks=rows), out / f"compare-{method}")
    whole = not any(session.dir.stage(stage).begun for stage in ("pairs", "erase"))
    meter, began, cpu = Meter(), time.perf_counter(), time.process_time()
    with meter.on(session.model.denoiser):
        if session.method.takes_pairs:
            make_pairs(session)
        erase(session)
    cost = {
        "seconds": round(time.perf_counter() - began, 1),
        "core_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "denoiser_rows": meter.rows,
    }
    costs = out / f"compare-{method}" / "cost.json"
    if whole:  # a run that is read back costs nothing, and one that goes on costs less than the whole
        write_json(costs, cost)
    take_originals(out, session.dir.path)
    attack(session)
    take_originals(out, session.dir.path)
    score(session)
    scores = read_json(out / f"compare-{method}" / "score" / "scores.json")
    sections = ("attacks", "preservation", "attributes", "near_misses")
    measured = read_json(costs) if costs.exists() else None
    return {"recipe": name, "cost": measured, **{key: scores[key] for key in sections}}


def take_originals(out: Path, folder: Path) -> None:
    """What the original model draws is the same in every run: it is copied from a run that has drawn it."""
    for other in sorted(out.glob("compare-*")):
        rows = [path.parent for path in other.glob("attack/*/original/manifest.json")]
        scored = (other / "score" / "manifest.json").exists()
        for one in [*rows, *(other.glob("score/images/*/original") if scored else [])]:
            take(one, folder / one.relative_to(other))


def compare(out: Path, docs: Path, workers: int, only: list[str]) -> None:
    """Every method's recipe, as `docs/results/methods.json`; runs that are finished are read back."""
    with ProcessPoolExecutor(workers, max_tasks_per_child=1) as pool:
        found = {name: pool.submit(compared, out, name, recipe) for name, recipe in recipes(only).items()}
        results = {name: future.result() for name, future in found.items()}
    command = "python benchmarks/methods.py compare"
    write_json(docs / "methods.json", {"methods": results, **machine(), "command": command})
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    lines = [
        "| method | plain: fire | held-out words | held-out subjects | spoiled (plain) | attributes, unrelated "
        "| preservation | core-seconds | peak memory | denoiser rows |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        rows = {row["name"]: row for row in one["attacks"] if row["model"] == "erased"}
        unrelated = one["attributes"]["unrelated"]
        kept = [unrelated[model]["all"]["mean"] for model in ("original", "erased")]
        cost = one["cost"]
        spent = "– | – | –"
        if cost is not None:
            spent = f"{cost['core_seconds']:.0f} | {cost['peak_memory_mib']} MiB | {cost['denoiser_rows']:,}"
        lines.append(
            f"| {name} | "
            + " | ".join(f"{rows[row]['rate']:.1%} ({rows[row]['low']:.0%}–{rows[row]['high']:.0%})" for row in ROWS)
            + f" | {rows['prompts']['corrupted_rate']:.0%} | {kept[1]:.1%} (of {kept[0]:.1%}) | "
            f"{one['preservation']['mean']:.3f} | {spent} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("tune", "compare"))
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=[], help="some of the methods")
    given = parser.parse_args()
    if given.task == "tune":
        tune(given.out, given.workers, given.only)
    else:
        compare(given.out, given.docs, given.workers, given.only)


if __name__ == "__main__":
    main()
