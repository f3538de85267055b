"""What a run would do and cost, before it does: counts from the recipe, time and memory from a measured step."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from duo.pairs import Pairs
from duo.plugins import Precision, Sampling
from duo.rundir import note
from duo.stages.metering import Meter, now
from duo.stages.rounds import Round
from duo.stages.session import MODELS, STEPS, UNRELATED, Session

HEADING = ("", "images", "denoiser", "backward", "VAE", "text enc.", "time")
COUNTS = ("images", "denoiser", "trained", "vae", "text")  # of `Work`, that are shown
NAME_WIDTH = 34
BACKWARD = 2  # a backward pass costs about as much as two forward ones


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one part of a run sends through the networks, in rows: an image or a prompt in one forward pass.

    `trained` are rows of the denoiser's forward that also go backward; they are counted in `denoiser` too.
    """

    name: str
    images: int = 0
    denoiser: int = 0
    trained: int = 0
    vae: int = 0
    text: int = 0
    steps: int = 0  # of the method, whose time is measured by the step


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step on this device, in seconds: a row of the denoiser, what else an image takes, a step of training.

    `memory` is the most bytes that were held while it was measured, `on` where. `first` and `each` are the denoiser's
    rows of one image: for the first step and each (a scheduler may need a step more; guidance has two rows).
    """

    row: float
    image: float
    step: float | None
    memory: int
    on: str
    first: float
    each: float

    def rows(self, steps: int) -> float:
        """The denoiser's rows for one image of so many sampling steps."""
        return self.first + self.each * steps


def plan(session: Session) -> list[str]:
    """The plan in lines to print. Nothing is written to the run folder, and no image of the recipe is made."""
    return _plan(session, _work)


def plan_erasure(session: Session, *, runs: int | None = None, drawings: int = 1) -> list[str]:
    """The same of the erasure alone; with `runs` of a search of at most so many, of which `session` is one.

    The images that the method draws for itself are drawn so many times, `drawings`.
    """
    return _plan(session, _stage_work if runs is None else partial(_search_work, runs=runs, drawings=drawings))


def _plan(session: Session, work: Callable[[Session, Measured], Iterator[Work]]) -> list[str]:
    session.check_model(pairs=None if session.recipe.pairs.brought else session.recipe.pairs.n)
    measured = _measure(session)
    parts = list(work(session, measured))
    times = [_seconds(one, measured) for one in parts]
    rows = [
        (one.name, *map(str, (one.images, one.denoiser, one.trained, one.vae, one.text)), _clock(seconds))
        for one, seconds in zip([*parts, _total(parts)], [*times, sum(times)], strict=True)
    ]
    made = f"the erasure {session.recipe.erased}" if session.recipe.method is None else session.recipe.method.name
    lines = [f"{made} on {session.recipe.model}, {session.device}; nothing is written"]
    lines += aligned([HEADING, *rows], least=NAME_WIDTH)
    step = "reckoned from that (the method takes no steps, or first draws images of its own)"
    if measured.step is not None:
        step = f"{measured.step:.3g} s a step"
    lines += [
        "rows in one forward pass each; pairs at their least: every rejected image is one more",
        f"measured: denoiser {measured.row:.3g} s a row, the rest of an image {measured.image:.3g} s, training {step}",
        f"memory: {measured.memory / 2**30:.2f} GiB at most on {measured.on} in the measured steps",
    ]
    return lines


def aligned(rows: Sequence[Sequence[str]], *, least: int = 0) -> list[str]:
    """Rows of texts as lines of a table: the first column to the left, at `least` so wide, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = max(widths[0], least)
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _work(session: Session, measured: Measured) -> Iterator[Work]:
    recipe = session.recipe
    steps = recipe.sampling.num_inference_steps
    rows = measured.rows(steps)
    n = recipe.pairs.n
    if session.method is not None and session.method.takes_pairs and not recipe.pairs.brought:
        edited = measured.rows(int((recipe.pairs.strength or 1) * steps))
        texts = len({text for both in session.pair_prompts for text in both} | {""})
        yield Work(name="pairs", images=2 * n, denoiser=round(n * (rows + edited)), vae=3 * n, text=texts)
    yield from _stage_work(session, measured)
    yield from _attack_work(session, measured, models=len(session.models))
    sets = [len(session.prompts(UNRELATED)), *(len(near.prompts) for near in session.near_misses.values())]
    images = len(MODELS) * (recipe.score.unrelated + recipe.score.near_miss * len(session.near_misses))
    yield Work(name="score", images=images, denoiser=round(images * rows), vae=images, text=sum(sets))
    if session.quality:
        images = (len(MODELS) + session.draws_references) * session.captions_n
        yield Work(name="score: captions", images=images, denoiser=round(images * rows), vae=images, text=images)
    unsafe = sum(row.images for row in recipe.attacks if row.row == recipe.score.unsafe_row)  # rows' names differ
    if twins := min(session.twins, unsafe):
        edited = measured.rows(int((recipe.pairs.strength or 1) * steps))
        yield Work(name="score: safe twins", images=twins, denoiser=round(twins * edited), vae=2 * twins, text=twins)


def _stage_work(session: Session, measured: Measured) -> Iterator[Work]:
    """The erase stage: one erasure, and its rounds of hardening."""
    yield from _erase_work(session, measured, pairs=session.recipe.pairs.n)
    if session.recipe.hardens is not None:
        yield from _hardening_work(session, measured)


def _erase_work(session: Session, measured: Measured, *, pairs: int, when: str = "") -> Iterator[Work]:
    """One erasure, by so many pairs."""
    if session.method is not None:
        erased = _passes(session.method, pairs)
        if drawn := erased.pop("images", 0):  # a method says how many, the recipe by how many steps
            rows = measured.rows(session.recipe.sampling.num_inference_steps)
            yield Work(name=f"{when}erase: images to learn from", images=drawn, denoiser=round(drawn * rows))
        yield Work(name=f"{when}erase", **erased)


def _attack_work(session: Session, measured: Measured, *, models: int, when: str = "") -> Iterator[Work]:
    """Every attack row, on so many models, and the images that attacks learn from."""
    rows = measured.rows(session.recipe.sampling.num_inference_steps)
    for kind in ("images", "harmless"):
        if any(getattr(attack, f"learns_from_{kind}", False) for attack in session.attacks.values()):
            m = session.recipe.attack_images
            yield Work(name=f"{when}attack: {kind} to learn from", images=m, denoiser=round(m * rows), vae=m, text=m)
    for row in session.recipe.attacks:
        prompts = min(len(session.prompts(row.prompts)[: row.searches]), row.images)
        attack = session.attacks[row.row]
        searched = {name: models * count for name, count in _passes(attack, prompts).items()}
        images = models * (row.images + prompts * getattr(attack, "queries", 0))
        yield Work(
            name=f"{when}attack: {row.row}",
            images=images,
            denoiser=round(images * rows) + searched.get("denoiser", 0),
            trained=searched.get("trained", 0),
            vae=images + searched.get("vae", 0),
            text=models * prompts + searched.get("text", 0),
        )


def _search_work(session: Session, measured: Measured, *, runs: int, drawings: int) -> Iterator[Work]:
    """At most so many erasures; each is looked at, and once the original model is."""
    rows, models = measured.rows(session.recipe.sampling.num_inference_steps), 1 + runs
    for one in _erase_work(session, measured, pairs=session.recipe.pairs.n):
        times = drawings if one.images else runs
        counts = {name: times * getattr(one, name) for name in (*COUNTS, "steps")}
        yield Work(name=one.name if times == 1 else f"{one.name}, at most {times} times", **counts)
    yield from _attack_work(session, measured, models=models)
    images, texts = models * session.recipe.score.unrelated, models * len(session.prompts(UNRELATED))
    yield Work(name="unrelated prompts", images=images, denoiser=round(images * rows), vae=images, text=texts)


def _hardening_work(session: Session, measured: Measured) -> Iterator[Work]:
    """All rounds, where everything comes back and each image has a twin at the first edit."""
    recipe, settings = session.recipe, session.recipe.hardens
    assert settings is not None  # or there are no rounds
    steps = recipe.sampling.num_inference_steps
    rows, edited = measured.rows(steps), measured.rows(int((recipe.pairs.strength or 1) * steps))
    came_back = sum(row.images // 2 for row in settings.attacks)
    for number in range(settings.rounds + 1):
        when, pairs = f"round {number}: ", recipe.pairs.n + number * came_back
        one = Round(session, number, grown=pairs / recipe.pairs.n)
        if number:
            twins = {"denoiser": round(came_back * edited), "vae": 2 * came_back, "text": 2 * came_back}
            yield Work(name=f"{when}safe twins at most", images=came_back, **twins)
            yield from _erase_work(one, measured, pairs=pairs, when=when)
        yield from _attack_work(one, measured, models=1, when=when)
        drawn = 0 if session.preservation is None else settings.unrelated * (1 if number else 2)
        yield Work(name=f"{when}unrelated", images=drawn, denoiser=round(drawn * rows), vae=drawn, text=drawn)


def _passes(leaf: Any, n: int) -> dict[str, int]:
    """What a method needs for n pairs, or an attack's search for n prompts: of leaves that say so, by `passes`."""
    passes: Mapping[str, int] = leaf.passes(n) if hasattr(leaf, "passes") else {}
    return dict(passes)


def _total(parts: list[Work]) -> Work:
    return Work(name="total", **{name: sum(getattr(one, name) for one in parts) for name in COUNTS})


def _seconds(work: Work, measured: Measured) -> float:
    """Searches by the text encoder alone take no part: it is small beside the denoiser."""
    if work.steps and measured.step is not None:
        return work.steps * measured.step
    return measured.row * (work.denoiser + BACKWARD * work.trained) + measured.image * work.images


# --- measuring --------------------------------------------------------------------------------------


def _measure(session: Session) -> Measured:
    """Two and three sampling steps of one block, and two training steps on made-up pairs, the last of each timed."""
    model, recipe = session.model, session.recipe
    note("measuring a block of images and two steps; on a machine that is busy every time comes out too long")
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    block = recipe.block
    meters = []
    for steps in (2, 3):  # the first also warms up
        meter, began = Meter(), now(session.device)
        with meter.on(model.denoiser, session.device):
            images = model.generate(
                [""] * block,
                seeds=list(range(block)),
                sampling=replace(recipe.sampling, num_inference_steps=steps),
                negative_prompts=[""] * block,
            )
        took = now(session.device) - began
        meters.append(meter)
    each = (meters[1].rows - meters[0].rows) / block
    return Measured(
        row=meters[1].seconds / meters[1].rows,
        image=max(0.0, took - meters[1].seconds) / block,
        step=_training_step(session, images[0].size),
        memory=_most_memory(session.device),
        on=str(session.device),
        first=meters[0].rows / block - 2 * each,
        each=each,
    )


def _training_step(session: Session, size: tuple[int, int]) -> float | None:
    """Seconds of the second training step of the recipe's method, in a folder that is thrown away."""
    method: Any = session.method
    if not hasattr(method, STEPS) or "images" in _passes(method, 1):
        return None  # it would draw all its images first
    n = max(2, getattr(method, "train_batch_size", 2))
    grey, black = (Image.new("RGB", size, colour) for colour in ("grey", "black"))
    pairs = Pairs(names=[str(i) for i in range(n)], unsafe=[grey] * n, safe=[black] * n)
    with tempfile.TemporaryDirectory() as folder:
        run = _Stopwatch(Path(folder), session)
        replace(method, max_train_steps=2).erase(session.model, session.concept, pairs=pairs, run=run)
    return run.times[-1] - run.times[-2] if len(run.times) > 1 else None


class _Stopwatch:
    """A `duo.plugins.Run` that keeps when each step was logged, and nothing else."""

    def __init__(self, folder: Path, session: Session) -> None:
        self.folder, self.seed, self.device = folder, 0, session.device
        self.precision: Precision = session.recipe.precision
        self.sampling: Sampling = session.recipe.sampling
        self.times: list[float] = []

    def progress(self, total: int, label: str) -> Any:
        return nullcontext(self)

    def update(self, step: int, **numbers: float) -> None:
        """Nobody looks."""

    def log(self, **numbers: float | int | str) -> None:
        self.times.append(now(self.device))


def _most_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
