"""Our loops beside the peers', in one process, on the same model, rows and threads, in turn: `make bench`.

    python benchmarks/speed.py --memory --out docs/results/speed.json --docs docs/performance.md
    python benchmarks/speed.py --only training --rounds 3

Each case has a peer's loop, written anew from what its public code does and reduced to what takes time, and ours as it
is shipped. After one round that is not counted both are run in turn. What is told is the median time a unit of work of
each, and of their ratio the median with the quarter and three-quarter points over the rounds. `--memory` runs each side
in a process of its own and tells by how much its memory grew at its highest. Cases of real sizes need a CUDA device,
and say so where there is none. Run it alone: numbers of a busy machine are worth nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed_attacks
import torch
from pages import put
from results import machine
from speed_models import SIZES, real_size
from speed_training import AUTHORS, DIFFUSERS, Loop, Stamped, Steps
from sweeping import apart, together
from torch import Tensor

from duo import Session, load_concept, load_recipe, make_pairs
from duo.methods.uce import Uce
from duo.models import load_family
from duo.pairs import Pairs
from duo.plugins import Family
from duo.report import write_report
from duo.rundir import write_json

PAIRS = 8
NO_GPU = "not measured: no GPU"
HEADS = ("case", "a unit of work", "peer, ms", "ours, ms", "ours a second", "peer / ours", "memory MiB, peer / ours")

Side = Callable[[], float]  # one round: seconds a unit of work


@dataclass(frozen=True, kw_only=True)
class Case:
    """A unit of work, what a peer takes for it, and what we take. `told` is what else the rounds found out; `rounds`
    is the most that are worth their time."""

    unit: str
    ours: Side
    peer: Side | None = None
    peer_is: str = ""
    told: Callable[[], dict[str, Any]] = dict
    rounds: int = 99


def timed(work: Callable[[], object], units: int) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / units


# --- cases ------------------------------------------------------------------------------------------------


def toybox_pairs(model: Family) -> Pairs:
    concept, recipe = load_concept("toybox-fire"), load_recipe("toybox-fire")
    prompts = list(zip(concept.pairs.unsafe, concept.pairs.safe, strict=True))[:PAIRS]
    sides = [
        model.generate(list(side), seeds=range(PAIRS), sampling=recipe.sampling) for side in zip(*prompts, strict=True)
    ]
    return Pairs(names=[str(i) for i in range(PAIRS)], unsafe=sides[0], safe=sides[1])


def training(model: Family, *, loop: Loop = AUTHORS) -> Case:
    sides = Steps(model, toybox_pairs(model), loop, steps=6)
    return Case(unit="step of 4 pairs", ours=sides.ours, peer=sides.peer, peer_is=loop.name, told=sides.told, rounds=5)


def training_dpo(model: Family) -> Case:
    """That loop has no prior term, so it sends 2 rows of a pair through the denoiser where DUO sends 3."""
    return training(model, loop=DIFFUSERS)


def sweep(model: Family) -> Case:
    """An experiment that is not shipped: what one reference pass for all strengths of a sweep would give."""
    pairs = toybox_pairs(model)
    return Case(
        unit="step of 4 strengths",
        ours=lambda: together(model, pairs),
        peer=lambda: apart(model, pairs),
        peer_is="each strength with a reference pass of its own (as shipped)",
        rounds=3,
    )


def generation(model: Family, *, n: int = 16) -> Case:
    prompts, sampling = load_concept("toybox-fire").prompt_set("unrelated")[:n], load_recipe("toybox-fire").sampling
    pipeline = model._pipeline(model._drawing, None)

    def one_by_one() -> None:
        for seed, prompt in enumerate(prompts):
            pipeline(
                prompt,
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
            )

    return Case(
        unit="image",
        ours=lambda: timed(lambda: model.generate(prompts, seeds=range(n), sampling=sampling), n),
        peer=lambda: timed(one_by_one, n),
        peer_is="the diffusers pipeline at batch 1",
        rounds=5,
    )


def pairs(_model: Family, *, n: int = 8) -> Case:
    """The pairs stage with its rejections, in the blocks that recipes have and an image at a time."""

    def made(block: int) -> float:
        sizes = [f"pairs.n={n}", f"pairs.block={block}", f"method.train_batch_size={n}"]
        recipe = load_recipe("toybox-fire", overrides=sizes)
        with tempfile.TemporaryDirectory() as folder:
            session = Session(recipe, Path(folder) / "run")
            _ = session.model  # loading is not in the time
            return timed(lambda: make_pairs(session), n)

    return Case(
        unit="pair",
        ours=lambda: made(16),
        peer=lambda: made(1),
        peer_is="the same stage an image at a time",
        rounds=3,
    )


def text_encoder(model: Family, *, n: int = 64) -> Case:
    """What Ring-A-Bell's population costs: its peer encodes one individual at a time."""
    tokenizer, words = model.tokenizer(), load_concept("toybox-fire").prompt_set("unrelated")[:n]
    length = tokenizer.model_max_length
    ids: Tensor = tokenizer(
        list(words), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids

    @torch.no_grad()
    def one_by_one() -> None:
        for row in ids:
            model.encode_ids(row[None])

    return Case(
        unit="prompt encoded",
        ours=lambda: timed(lambda: model.encode_ids(ids), len(ids)),
        peer=lambda: timed(one_by_one, len(ids)),
        peer_is="Ring-A-Bell's loop, an individual at a time",
    )


def attack(name: str, peer_is: str) -> Callable[[Family], Case]:
    """A case of `speed_attacks`."""

    def case(model: Family) -> Case:
        ours, peer = getattr(speed_attacks, name)(model)
        return Case(unit="attack step", ours=ours, peer=peer, peer_is=peer_is, rounds=5)

    return case


def sneaky_prompt(model: Family) -> Case:
    return Case(unit="image query", ours=speed_attacks.sneaky_prompt(model), rounds=3)


def closed_form(model: Family, *, n: int = 1000) -> Case:
    """UCE of a thousand texts at once."""
    concept = load_concept("toybox-fire")
    texts = [f"{word} {i}" for i in range(n // 4 + 1) for word in concept.words][:n]
    method = Uce(concepts=tuple(texts), anchor="")

    def erase() -> None:
        with tempfile.TemporaryDirectory() as folder:
            method.erase(model, concept, pairs=None, run=Stamped(Path(folder)))

    return Case(unit=f"{len(texts):,} concepts by UCE", ours=lambda: timed(erase, 1), rounds=3)


def judging(model: Family, *, n: int = 32) -> Case:
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


def report(_model: Family) -> Case:
    """The page of a made-up run, that of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "report"))
    import synthetic

    folder = tempfile.TemporaryDirectory()
    run = Path(synthetic.write_run(Path(folder.name) / "run", images=10))
    rows = len((run / "score" / "verdicts.jsonl").read_text().splitlines())

    def write() -> None:
        assert folder is not None  # which keeps the run for as long as the case
        write_report(run)

    return Case(unit=f"report of {rows:,} images", ours=lambda: timed(write, 1), rounds=3)


def help_page(_model: Family) -> Case:
    command = [sys.executable, "-m", "duo", "--help"]
    return Case(
        unit="`duo --help`", ours=lambda: timed(lambda: subprocess.run(command, check=True, capture_output=True), 1)
    )


def real(name: str) -> Callable[[Family], Case]:
    """Training at a real size, with random weights in bfloat16."""

    def case(_model: Family) -> Case:
        model, pairs, batch, precision = real_size(name, device="cuda")
        sides = Steps(model, pairs, AUTHORS, steps=4, batch=batch, precision=precision)
        unit = f"step of {batch} pair{'s' if batch > 1 else ''}"
        return Case(unit=unit, ours=sides.ours, peer=sides.peer, peer_is=AUTHORS.name, told=sides.told, rounds=5)

    return case


CASES: Mapping[str, Callable[[Family], Case]] = {
    "training": training,
    "training-dpo": training_dpo,
    "generation": generation,
    "pairs": pairs,
    "judging": judging,
    "ring-a-bell": text_encoder,
    "concept-inversion": attack("concept_inversion", "textual inversion with the VAE and the whole table every step"),
    "p4d": attack("p4d", "the undefended model asked every step"),
    "unlearn-diff-atk": attack("unlearn_diff_atk", "one-hot rows times the table, bisection"),
    "sneaky-prompt": sneaky_prompt,
    "uce": closed_form,
    "report": report,
    "help": help_page,
    "sweep": sweep,
    **{name: real(name) for name in SIZES},
}


# --- measuring --------------------------------------------------------------------------------------------


def measured(case: Case, *, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which the sides take turns, after one that is not counted."""
    sides = {"peer": case.peer, "ours": case.ours} if case.peer else {"ours": case.ours}
    times: dict[str, list[float]] = {name: [] for name in sides}
    rounds = min(rounds, case.rounds)
    for number in range(rounds + 1):
        for name, side in sides.items():
            took = side()
            if number:
                times[name].append(took)
    found: dict[str, Any] = {"unit": case.unit, "peer_is": case.peer_is, "rounds": rounds, **case.told()}
    found["seconds"] = {name: statistics.median(each) for name, each in times.items()}
    if case.peer:
        ratios = [peer / ours for peer, ours in zip(times["peer"], times["ours"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found["ratio"] = {"low": low, "median": median, "high": high}
    return found


def grown(side: Side) -> float:
    """By how many MiB memory grew at the highest while a side ran once: the GPU's, or else resident size (Linux).

    What lies there already, the imports and the model, is in neither. Where the kernel cannot count from now, it is the
    growth of the highest size ever.
    """
    if torch.cuda.is_initialized():  # the case is on a GPU
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass
    before = resident("VmRSS")
    side()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """In MiB, of this process: now (VmRSS) or at its highest (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
        return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak(name: str, side: str, given: argparse.Namespace) -> float:
    """What `grown` tells of a process that runs one side once."""
    command = [sys.executable, __file__, "--only", name, "--side", side]
    command += ["--threads", str(given.threads), "--device", given.device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, {side}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def peaks(name: str, sides: Sequence[str], given: argparse.Namespace) -> dict[str, float]:
    """Of each side; on a CPU both at the same time, for nothing is timed, and on a GPU there may be room for one."""
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else len(sides)) as pool:
        return dict(zip(sides, pool.map(lambda side: peak(name, side, given), sides), strict=True))


def line(name: str, found: Mapping[str, Any]) -> str:
    """One row of the table."""
    if "not_measured" in found:
        return f"| {name} | {found['not_measured']} |{' |' * (len(HEADS) - 2)}"
    seconds = found["seconds"]
    ratio = found.get("ratio")
    told = f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""
    memory = " / ".join(f"{size:.0f}" for size in found.get("grown_mib", {}).values())
    peer = f"{1000 * seconds['peer']:.1f}" if "peer" in seconds else ""
    ours = f"{1000 * seconds['ours']:.1f}"
    cells = (name, found["unit"], peer, ours, f"{1 / seconds['ours']:.1f}", told, memory)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=CASES, action="append", help="this case; may be given several times")
    parser.add_argument("--rounds", type=int, default=7, help="the most of any case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the embedded model; real sizes are always on CUDA")
    parser.add_argument("--memory", action="store_true", help="also by how much each side's memory grows")
    parser.add_argument("--side", choices=("peer", "ours"), help="run this side once, and print its growth in MiB")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--docs", type=Path, help="a page with two marks, between which the table is put")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load_family("toybox", device=given.device)
    if given.side:
        print(grown(getattr(CASES[given.only[0]](model), given.side)))
        return
    whole: dict[str, Any] = {**machine(), "threads": given.threads, "device": given.device, "cases": {}}
    whole["torch"], whole["load_before"] = torch.__version__, os.getloadavg()[0]
    rows = [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    print(*rows, sep="\n")
    for name in given.only or list(CASES):
        if name in SIZES and not torch.cuda.is_available():
            found: dict[str, Any] = {"not_measured": NO_GPU}
        else:
            case = CASES[name](model)
            found = measured(case, rounds=given.rounds)
            if given.memory and name != "help":  # whose memory is another process's
                sides = ("peer", "ours") if case.peer else ("ours",)
                found["grown_mib"] = peaks(name, sides, given)
        whole["cases"][name] = found
        rows.append(line(name, found))
        print(rows[-1], flush=True)
    if given.out:
        write_json(given.out, whole)
    else:
        print(json.dumps(whole, indent=2))
    if given.docs:
        told = f"{whole['machine']}, commit {whole['commit'][:7]}{', dirty' if whole.get('dirty') else ''}"
        head = f"{told}, torch {whole['torch']}, {given.threads} thread(s), load before {whole['load_before']:.1f}:\n\n"
        put(given.docs, head + "\n".join(rows), by="bench")


if __name__ == "__main__":
    main()
