"""Our loops beside the peers', in one process, on the same model, rows and threads, in turn: `make bench`.

    python benchmarks/speed.py --out docs/results/speed.json
    python benchmarks/speed.py --only training --rounds 9

Each case has a peer's loop, written anew from what its public code does and reduced to what takes time, and ours as it
is shipped. After one round that is not counted both are run in turn. What is told is the median time a unit of work of
each, and of their ratio the median with the quarter and three-quarter points over the rounds. `--memory` runs each side
in a process of its own and tells its highest resident size. Run it alone: numbers of a busy machine are worth nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import machine
from torch import Tensor, nn

from duo import load_concept, load_recipe
from duo.losses import duo_loss, prior_loss, squared_error
from duo.methods.duo import Duo
from duo.methods.uce import Uce
from duo.models import load_family
from duo.pairs import Pairs
from duo.plugins import Family, Precision, Sampling
from duo.rundir import write_json
from duo.training import attach_lora

SEED = 3
PAIRS, BATCH = 16, 4
SCOPE = ("self_attention",)
PARTS = ("draw", "text", "vae", "policy", "reference", "loss", "backward", "optimiser")
SHARED = ("policy", "reference", "backward", "optimiser")  # what no cache saves


@dataclass
class Clock:
    """Seconds by part, summed."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[part] += time.perf_counter() - start


@dataclass
class Stamped:
    """A `duo.plugins.Run` that keeps when each step was told, and its loss."""

    folder: Path
    seed: int = SEED
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    sampling: Sampling = field(default_factory=Sampling)
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[Stamped]:
        yield self

    def update(self, step: int, **numbers: float) -> None:
        pass

    def log(self, **numbers: Any) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(numbers["loss"])


# --- training ---------------------------------------------------------------------------------------------


def peer_steps(model: Family, pairs: Pairs, *, steps: int, clock: Clock) -> tuple[float, list[float]]:
    """Seconds a step, and the losses, of a loop like the authors' train/unlearn-sd.py on one process.

    Every step encodes the images of both sides by the VAE and 3B empty prompts, sends 3B rows through the adapted
    denoiser and 3B through the frozen one, clips, steps, and reads every number by itself. For equal losses the VAE's
    mean stands for its sample, draws are ours, and the last numbers are those that we tell.
    """
    layers = sorted(name for scope in SCOPE for name in model.layers(scope))
    generator, process, losses = torch.Generator().manual_seed(SEED), model.process, []
    with attach_lora(model.denoiser, layers, rank=32, alpha=32.0, seed=SEED) as lora:
        parameters = list(lora.parameters)
        optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
        start = time.perf_counter()
        for step in range(steps + 1):
            if step == 1:  # the first one warms up
                start = time.perf_counter()
                clock.parts = dict.fromkeys(PARTS, 0.0)
            with clock("draw"):
                chosen = torch.randperm(len(pairs), generator=generator)[:BATCH]
                noise = torch.randn(BATCH, *model.latent_shape, generator=generator)
                t = process.sample_t(2 * BATCH, low=0.0, high=0.75, generator=generator)
            with clock("text"), torch.no_grad():
                text = model.text([""] * 3 * BATCH)
            with clock("vae"), torch.no_grad():
                images = [side[i] for side in (pairs.unsafe, pairs.safe) for i in chosen.tolist()]
                x0 = model.latents(images, generator=None).float()
            eps = noise.repeat(2, 1, 1, 1)
            terminal, last = process.terminal(noise)
            x_t = torch.cat([process.noised(x0, eps, t), terminal])
            with clock("policy"):
                policy = model.predict(x_t, torch.cat([t, last]), text)
            with clock("reference"), lora.disabled():
                reference = model.predict(x_t, torch.cat([t, last]), text)
            with clock("loss"):
                errors = [squared_error(one[: 2 * BATCH], eps).chunk(2) for one in (policy, reference)]
                preference = duo_loss(
                    policy_unsafe=errors[0][0],
                    policy_safe=errors[0][1],
                    reference_unsafe=errors[1][0],
                    reference_safe=errors[1][1],
                    beta=20.0,
                )
                prior = prior_loss(policy[2 * BATCH :], reference[2 * BATCH :])
                loss = preference.loss + 100.0 * prior
            with clock("backward"):
                loss.backward()
            with clock("optimiser"):
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
            _ = [one.item() for one in (preference.margin, preference.accuracy, prior)]
        took = time.perf_counter() - start
    return took / steps, losses


def our_steps(model: Family, pairs: Pairs, *, steps: int) -> tuple[float, list[float]]:
    """The same of `Duo.erase`; neither what it prepares once nor the last step, which saves, is in the time."""
    method = Duo(
        beta=20.0,
        learning_rate=1e-4,
        prior_weight=100.0,
        max_train_steps=steps + 2,
        train_batch_size=BATCH,
        targets=SCOPE,
        checkpointing_steps=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Stamped(Path(folder))
        method.erase(model, None, pairs=pairs, run=run)
    return (run.times[steps] - run.times[0]) / steps, run.losses[: steps + 1]


# --- cases ------------------------------------------------------------------------------------------------

Side = Callable[[], float]  # one round: seconds a unit of work


@dataclass(frozen=True, kw_only=True)
class Case:
    """A unit of work, what a peer takes for it, and what we take. `told` is what else the rounds found out."""

    unit: str
    ours: Side
    peer: Side | None = None
    peer_is: str = ""
    told: Callable[[], dict[str, Any]] = dict


def timed(work: Callable[[], object], units: int) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / units


def training(model: Family, *, steps: int = 6) -> Case:
    concept, recipe = load_concept("toybox-fire"), load_recipe("toybox-fire")
    prompts = list(zip(concept.pairs.unsafe, concept.pairs.safe, strict=True))[:PAIRS]
    sides = [
        model.generate(list(side), seeds=range(PAIRS), sampling=recipe.sampling) for side in zip(*prompts, strict=True)
    ]
    pairs = Pairs(names=[str(i) for i in range(PAIRS)], unsafe=sides[0], safe=sides[1])
    clocks: list[dict[str, float]] = []
    losses: dict[str, list[float]] = {}

    def peer() -> float:
        clock = Clock()
        took, losses["peer"] = peer_steps(model, pairs, steps=steps, clock=clock)
        clocks.append({part: seconds / steps for part, seconds in clock.parts.items()})
        return took

    def ours() -> float:
        took, losses["ours"] = our_steps(model, pairs, steps=steps)
        return took

    def told() -> dict[str, Any]:
        parts = {part: statistics.median(one[part] for one in clocks) for part in PARTS}
        limit = sum(parts.values()) / sum(parts[part] for part in SHARED)
        apart = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
        return {"peer_seconds_by_part": parts, "amdahl_limit": limit, "largest_relative_difference_of_losses": apart}

    return Case(
        unit="step of 4 pairs", ours=ours, peer=peer, peer_is="the authors' loop (VAE and text every step)", told=told
    )


def generation(model: Family, *, n: int = 16) -> Case:
    prompts, sampling = load_concept("toybox-fire").prompt_set("unrelated")[:n], load_recipe("toybox-fire").sampling

    def one_by_one() -> None:
        for seed, prompt in enumerate(prompts):
            model.generate([prompt], seeds=[seed], sampling=sampling)

    return Case(
        unit="image",
        ours=lambda: timed(lambda: model.generate(prompts, seeds=range(n), sampling=sampling), n),
        peer=lambda: timed(one_by_one, n),
        peer_is="the diffusers pipeline at batch 1",
    )


def text_encoder(model: Family, *, n: int = 64) -> Case:
    """What Ring-A-Bell's population costs: its peer encodes one individual at a time."""
    tokenizer, words = model.tokenizer(), load_concept("toybox-fire").prompt_set("unrelated")[:n]
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        list(words), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids

    def one_by_one() -> None:
        for row in ids:
            model.encode_ids(row[None])

    return Case(
        unit="prompt encoded",
        ours=lambda: timed(lambda: model.encode_ids(ids), n),
        peer=lambda: timed(one_by_one, n),
        peer_is="Ring-A-Bell's loop, an individual at a time",
    )


def closed_form(model: Family, *, n: int = 1000) -> Case:
    """UCE of a thousand texts at once."""
    concept = load_concept("toybox-fire")
    texts = [f"{word} {i}" for i in range(n // 4) for word in concept.words]
    method = Uce(concepts=tuple(texts[:n]), anchor="")

    def erase() -> None:
        with tempfile.TemporaryDirectory() as folder:
            method.erase(model, concept, pairs=None, run=Stamped(Path(folder)))

    return Case(unit="1,000 concepts by UCE", ours=lambda: timed(erase, 1))


def judging(model: Family, *, n: int = 64) -> Case:
    """The scoring judge, in the batches that scores take and one image at a time."""
    concept = load_concept("toybox-fire")
    judge, sampling = concept.judge.make("judges", "judge"), load_recipe("toybox-fire").sampling
    images = model.generate(list(concept.prompt_set("unrelated")[:n]), seeds=range(n), sampling=sampling)
    return Case(
        unit="image judged",
        ours=lambda: timed(lambda: judge(images), n),
        peer=lambda: timed(lambda: [judge([image]) for image in images], n),
        peer_is="an image at a time",
    )


def help_page(_model: Family) -> Case:
    command = [sys.executable, "-m", "duo", "--help"]
    return Case(
        unit="`duo --help`", ours=lambda: timed(lambda: subprocess.run(command, check=True, capture_output=True), 1)
    )


CASES: Mapping[str, Callable[[Family], Case]] = {
    "training": training,
    "generation": generation,
    "text-encoder": text_encoder,
    "judging": judging,
    "closed-form": closed_form,
    "help": help_page,
}


# --- measuring --------------------------------------------------------------------------------------------


def measured(case: Case, *, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which the sides take turns, after one that is not counted."""
    sides = {"peer": case.peer, "ours": case.ours} if case.peer else {"ours": case.ours}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            took = side()
            if number:
                times[name].append(took)
    found: dict[str, Any] = {"unit": case.unit, "peer_is": case.peer_is, "rounds": rounds, **case.told()}
    found["seconds"] = {name: statistics.median(each) for name, each in times.items()}
    if case.peer:
        ratios = [peer / ours for peer, ours in zip(times["peer"], times["ours"], strict=True)]
        found["ratio"] = dict(zip(("low", "median", "high"), statistics.quantiles(ratios, n=4), strict=True))
    return found


def peak(name: str, side: str) -> float:
    """The highest resident size of a process that runs one side once, in MiB."""
    command = [sys.executable, __file__, "--only", name, "--side", side]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(told.strip().splitlines()[-1])


def line(name: str, found: Mapping[str, Any]) -> str:
    """One row of the table."""
    seconds = found["seconds"]
    per_second = {side: 1 / each for side, each in seconds.items()}
    ratio = found.get("ratio")
    told = f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
    memory = " / ".join(f"{size:.0f}" for size in found.get("peak_mib", {}).values())
    peer = f"{1000 * seconds['peer']:.1f}" if "peer" in seconds else ""
    cells = (name, found["unit"], peer, f"{1000 * seconds['ours']:.1f}", f"{per_second['ours']:.1f}", told, memory)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="this case; may be given several times")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="also each side's highest resident size")
    parser.add_argument("--side", choices=("peer", "ours"), help="run this side once, and print its peak in MiB")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.only or list(CASES)
    model = load_family("toybox", device=given.device)
    if given.side:
        side = getattr(CASES[names[0]](model), given.side)
        side()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    whole: dict[str, Any] = {**machine(), "threads": given.threads, "cases": {}}
    print("| case | a unit of work | peer, ms | ours, ms | ours a second | peer / ours | peak MiB, peer / ours |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        case = CASES[name](model)
        found = measured(case, rounds=given.rounds)
        if given.memory:
            sides = ("peer", "ours") if case.peer else ("ours",)
            found["peak_mib"] = {side: peak(name, side) for side in sides}
        whole["cases"][name] = found
        print(line(name, found), flush=True)
    if given.out:
        write_json(given.out, whole)
        print(given.out)
    else:
        print(json.dumps(whole, indent=2))


if __name__ == "__main__":
    main()
