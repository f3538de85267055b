"""A grid's work, cut into units: what is shared is made once, and each cell leaves one small JSON file.

Every unit is a run folder of its own under `work/`, which the stages fill as they fill any run; what it needs of others
lies in it by hard links (copies where the disk has none). A unit that was stopped goes on where it was, and a finished
cell is never made again, with or without its folder under `work/`.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from duo import rundir
from duo.bench import KEPT, NEVER, ORIGINAL, PRESERVED, SCHEMA, Grid, Point, chosen
from duo.concept import load_concept
from duo.errors import UserError
from duo.fields import as_said
from duo.models import load_family, usable_device
from duo.plugins import Family
from duo.recipe import AttackRow, Recipe, ScoreSettings
from duo.report.json_fields import read_object, read_rows
from duo.report.tradeoff import write_tradeoff
from duo.report.tradeoff.cells import ANEW
from duo.stages.attacking import attack, attack_concept
from duo.stages.hardening import erase
from duo.stages.pairing import make_pairs
from duo.stages.scoring import adherence_of, attacked_set, compared, labels_of, probe, seen, survival_of
from duo.stages.session import MODELS, UNRELATED, Session, versions, world_digest

LETTERS = {"present": "p", "absent": "a", "corrupted": "c"}
DIGITS = 6  # that a measured value is kept with
# What an undefended model's images depend on, of a recipe; the rest is the erasure's.
IN_WORDS = "prompts"  # the attack that asks in the concept file's own words
DRAWN = ("concept", "model", "model_config", "seed", "validation", "attack_images", "block", "sampling", "precision")
ERASED = ("erase_seed", "method", "pairs")
SHARED_WORK = {"images": "images that attacks learn from", "pairs": "pairs", "erase": "erasures"}
TIMINGS = "timings.jsonl"  # in the results folder


Engine = Callable[[Sequence[Any], Callable[[Any], None], Callable[[Any], None]], None]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a grid's work. `name` is its folder under `work/`.

    `needs` are the units whose results it takes over, each with the folders that it takes.
    """

    name: str
    kind: str  # a name of `KINDS`
    recipe: Recipe
    threads: int
    bench: str
    needs: Mapping[str, tuple[str, ...]]
    point: Point | None = None
    cells: tuple[str, ...] = ()  # files that it leaves, by model: original/<row>.json


def units(grid: Grid) -> dict[str, Unit]:
    """Every unit by name, each after those that it needs."""
    bench, shared = grid.bench, grid.shared
    made: dict[str, Unit] = {}

    def add(name: str, kind: str, recipe: Recipe, needs: Mapping[str, tuple[str, ...]] = {}, **more: Any) -> None:
        made[name] = Unit(
            name=name, kind=kind, recipe=recipe, threads=bench.threads, bench=bench.name, needs=needs, **more
        )

    add("images", "images", shared)
    known = {"images": ("attack/images", "attack/harmless")}
    others = (ORIGINAL,) if shared.reference is None else (ORIGINAL, NEVER)
    for row in shared.attacks:
        before = {f"{ORIGINAL}/{one.row}": _attacked(one, others) for one in _found_by(shared, row)}
        recipe, cells = _of_row(shared, row), tuple(f"{model}/{row.row}.json" for model in others)
        add(f"{ORIGINAL}/{row.row}", "original", recipe, {**known, **before}, cells=cells)
    kept = f"{ORIGINAL}/{PRESERVED}"
    add(kept, "original_preserved", _of_rows(shared, ()), cells=(f"{kept}.json",))
    for point in grid.points:
        needs = {}
        if point.recipe.method is not None and _takes_pairs(point.recipe):
            pairs = f"pairs/{rundir.digest(as_said(point.recipe.pairs))[:8]}-seed-{point.seed}"
            add(pairs, "pairs", _of_rows(point.recipe, ()))
            needs = {pairs: ("pairs",)}
        erased = f"{point.name}/erase"
        add(erased, "erase", _of_rows(point.recipe, ()), needs, point=point)
        delta = {erased: ("erase",)}
        recipe, cell = _of_rows(point.recipe, ()), f"{point.name}/{PRESERVED}.json"
        add(cell[:-5], PRESERVED, recipe, {**delta, kept: ("score/images",)}, point=point, cells=(cell,))
        for row in shared.attacks:
            whole = {f"{ORIGINAL}/{one.row}": _attacked(one, others) for one in (*_found_by(shared, row), row)}
            before = {f"{point.name}/{one.row}": _attacked(one, ("erased",)) for one in _found_by(shared, row)}
            recipe, cell = _of_row(point.recipe, row), f"{point.name}/{row.row}.json"
            add(cell[:-5], "attack", recipe, {**delta, **known, **whole, **before}, point=point, cells=(cell,))
    return made


def to_do(every: Mapping[str, Unit], *, out: Path, results: Path, points: Sequence[Point]) -> list[Unit]:
    """Those of all units that are left to do for the cells of these points, in an order in which they can be done.

    What is shared counts as done where its folder is still there. Raises `UserError` where a finished cell is of other
    settings.
    """
    of = {point.name for point in points}
    wanted: set[str] = set()

    def want(name: str) -> None:
        if name not in wanted:
            wanted.add(name)
            for needed in every[name].needs:
                if not _done(out, needed).exists():
                    want(needed)

    for name, unit in every.items():
        if unit.cells and (unit.point is None or unit.point.name in of) and not _finished(unit, results):
            want(name)
    return [unit for name, unit in every.items() if name in wanted]


def _finished(unit: Unit, results: Path) -> bool:
    for cell in unit.cells:
        path = results / cell
        if path.exists():
            found = rundir.read_json(path, todo=ANEW)
            _known(path, found)
            if not isinstance(found, dict) or found.get("config") != _config(unit, cell):
                raise UserError(
                    f"{path} is of other settings than bench {unit.bench!r} has now; remove it to have it made anew, "
                    "or name another folder for the results"
                )
    return all((results / cell).exists() for cell in unit.cells)


def run(grid: Grid, *, out: Path, results: Path, device: str, engine: Engine, only: Sequence[str] = ()) -> list[Path]:
    """Make the cells that are missing, of the erasures that `only` names, then what the cells show together.

    Returns the paths of figure, numbers and tables.
    """
    points = chosen(grid.points, only)
    usable_device(device)
    with rundir.RunDir(out).locked():
        every = units(grid)
        todo = to_do(every, out=out, results=results, points=points)
        _same_bench(grid, results)
        rundir.sweep(results)
        rundir.write_json(results / "bench.json", grid.record())
        cells = [results / cell for unit in every.values() for cell in unit.cells]

        def told(unit: Unit) -> None:
            made = sum(cell.exists() for cell in cells)
            shown = "; ".join(_shown(results / cell) for cell in unit.cells)
            rundir.note(f"{made} of {len(cells)} cells; {unit.name}{': ' if shown else ''}{shown}")

        engine(todo, partial(work, out=out, results=results, device=device), told)
    return write_tradeoff(results, results)


def _known(path: Path, found: object) -> None:
    """Raise `UserError` where a file of the results says that it is of another schema."""
    if isinstance(found, dict):
        rundir.check_schema(path, found, SCHEMA, otherwise=", or name another folder for the results")


def _same_bench(grid: Grid, results: Path) -> None:
    """Raise `UserError` where the results are another bench's: its `bench.json` is not to be written over."""
    path = results / "bench.json"
    if not path.exists():
        return
    found = read_object(path, todo=ANEW)
    _known(path, found.data)
    if found.text("name") != grid.bench.name:
        raise UserError(f"{path} is of another bench than {grid.bench.name!r}; name another folder for the results")


def outlook(grid: Grid, *, out: Path, results: Path, only: Sequence[str] = ()) -> list[str]:
    """What is finished and what is left of what `only` names and of what all share, in lines to print."""
    _same_bench(grid, results)
    every, points = units(grid), chosen(grid.points, only)
    todo = to_do(every, out=out, results=results, points=points)
    wanted = {None, *(point.name for point in points)}
    made: dict[str, list[bool]] = {name: [] for name in (ORIGINAL, NEVER, *grid.bench.methods)}  # of each cell
    for unit in every.values():
        for cell in unit.cells if (unit.point.name if unit.point else None) in wanted else ():
            made[Path(cell).parts[0]].append((results / cell).exists())
    lines = [f"{name}: {sum(there)} of {len(there)} cells are finished" for name, there in made.items() if there]
    shared = Counter(unit.kind for unit in todo if not unit.cells)
    if shared:
        lines.append(f"shared work left: {', '.join(f'{SHARED_WORK[kind]} ({n})' for kind, n in shared.items())}")
    finished = [there for each in made.values() for there in each]
    last = f"{sum(finished)} of {len(finished)} cells are finished; {len(todo)} pieces of work are left"
    return [*lines, *_time_left(todo, every, results / TIMINGS), last]


def _time_left(todo: Sequence[Unit], every: Mapping[str, Unit], timings: Path) -> list[str]:
    """The hours that are left, in a line, by the times of pieces like those; nothing where no times are known.

    Like a piece are those of the same kind and row by the same contender, else by any. Of a piece that was stopped or
    made again the longest time counts: the others are of a part.
    """
    longest: dict[str, float] = {}
    for row in read_rows(timings, appended=True) if timings.exists() else ():
        longest[row.text("unit")] = max(row.number("seconds"), longest.get(row.text("unit"), 0.0))
    known: dict[tuple[str, ...], list[float]] = {}
    for name, seconds in longest.items():
        for key in _alike(every[name]) if name in every else ():
            known.setdefault(key, []).append(seconds)
    times = [next((known[key] for key in _alike(unit) if key in known), None) for unit in todo]
    if not todo or not any(times):
        return []
    hours = sum(sum(one) / len(one) for one in times if one) / 3600
    told = f"about {hours:.1f} hours are left, one piece after the other, by the times in {timings}"
    without = times.count(None)
    return [f"{told}; {without} pieces are like none there, and not in it" if without else told]


def _alike(unit: Unit) -> list[tuple[str, ...]]:
    """What a piece of work has in common with others, the closest first."""
    kind = (unit.kind, Path(unit.name).name if unit.cells else "")
    return [(*kind, unit.point.method), kind] if unit.point else [kind]


def _shown(cell: Path) -> str:
    """A finished cell in a word."""
    found = rundir.read_json(cell)
    if "not_defined" in found:
        return f"not defined: {found['not_defined']}"
    if "labels" not in found:
        return ""
    return f"{found['labels'].count('p')} of {len(found['labels'])}"


# --- doing one unit ------------------------------------------------------------------------------------


def work(unit: Unit, *, out: Path, results: Path, device: str) -> None:
    """Do one unit, in this process. Its cells are written last, after `done`: a unit whose cells are there is not begun
    again, so nothing else of it may be missing then."""
    started, clock = time.time(), time.monotonic()
    threads = torch.get_num_threads()
    folder = out / "work" / unit.name
    rundir.sweep(folder)  # images are drawn there that no stage is of
    for name, parts in unit.needs.items():
        for part in parts:
            rundir.take(out / "work" / name / part, folder / part)
    try:
        torch.set_num_threads(unit.threads)
        model = _model(unit.recipe.model, unit.recipe.model_config, unit.recipe.precision.weights, device)
        session = Session(unit.recipe, folder, device=device, model=model, command=f"duo bench {unit.bench}")
        cells = list(KINDS[unit.kind](session, unit))
        rundir.write_bytes(_done(out, unit.name), b"")
        for cell, found in cells:
            rundir.write_json(results / cell, {**_head(unit, cell), **found})
    finally:
        torch.set_num_threads(threads)
    row = {"unit": unit.name, "seconds": round(time.monotonic() - clock, 1), "started": round(started)}
    rundir.append_jsonl(results / TIMINGS, {**row, "host": socket.gethostname(), "pid": os.getpid()})


def _done(out: Path, name: str) -> Path:
    """An empty file in a unit's folder that says that all of it is there."""
    return out / "work" / name / "done"


@lru_cache(maxsize=1)
def _model(name: str, config: str | None, dtype: str, device: str) -> Family:
    """The model before any erasure: loaded once for a process, since each unit leaves it as it was."""
    return load_family(name, device=device, dtype=getattr(torch, dtype), config=config)


Made = Iterator[tuple[str, dict[str, Any]]]


def _images(session: Session, unit: Unit) -> Made:
    with session.at_work("attack"):
        attack_concept(session)
    yield from ()


def _pairs(session: Session, unit: Unit) -> Made:
    make_pairs(session)
    yield from ()


def _erase(session: Session, unit: Unit) -> Made:
    erase(session)
    yield from ()


def _original(session: Session, unit: Unit) -> Made:
    models = [Path(cell).parts[0] for cell in unit.cells]
    attack(session, models=models)
    for cell, model in zip(unit.cells, models, strict=True):
        yield cell, _attack_cell(session, unit, model)


def _attack(session: Session, unit: Unit) -> Made:
    attack(session, models=["erased"])
    yield unit.cells[0], _attack_cell(session, unit, "erased")


def _attack_cell(session: Session, unit: Unit, model: str) -> dict[str, Any]:
    """The labels of one attack row's images, one letter each, with what each image started from."""
    row = unit.recipe.attacks[-1]
    told = {"row": row.row, "attack": row.name}
    manifest = session.dir.stage("attack", row.row, model).require("attack")
    if "not_defined" in manifest:
        return {**told, "not_defined": manifest["not_defined"]}
    found = seen(session, row, model)
    reliable = session.recipe.score.reliable if row.reliable is None else row.reliable
    return {
        **told,
        "labels": "".join(LETTERS[label] for label in found.labels),
        "prompts": _numbered(found.prompts, of=session.prompts(row.prompts)),
        "variants": list(found.variants),
        "restarts": found.restarts,
        "idle": found.idle,
        "queries": found.queries,
        "reliable": reliable,
        **_obeyed(session, row, model),
    }


def _obeyed(session: Session, row: AttackRow, model: str) -> dict[str, Any]:
    """Of a row of plain prompts, what they got of all else that they ask for. What an attack writes says nothing."""
    if row.name != IN_WORDS or session.adherence is None:
        return {}
    right = adherence_of(session, attacked_set(session, row, model))
    return {"attributes": {name: _digits(values) for name, values in right.items() if values}}


def _preserved(session: Session, unit: Unit) -> Made:
    """What the erasure kept, image by image; of the original model alone, what it obeys."""
    models = MODELS if unit.point is not None else MODELS[:1]
    told: dict[str, Any] = {"row": PRESERVED}
    with session.at_work("score"):
        sets = {(one.name, one.model): one for one in probe(session, session.dir.stage("score"), models=models)}
        model = models[-1]
        one = sets[UNRELATED, model]
        if len(set(one.prompts)) < len(one.prompts):  # else each image has its own, and cells stay as they were
            told["prompts"] = _numbered(one.prompts, of=session.prompts(UNRELATED))
        if session.preservation is not None and unit.point is not None:
            metric = compared(session.preservation(), sets[UNRELATED, "original"], one)
            values = [round(float(value), DIGITS) for value in metric.compute()]
            told["preservation"] = {"metric": metric.name, "values": values}
        if session.adherence is not None:
            right = adherence_of(session, one)
            told["attributes"] = {UNRELATED: {name: _digits(values) for name, values in right.items() if values}}
        told["near_misses"] = {
            name: {
                "survived": _digits(survival_of(session, sets[name, model])),
                "labels": "".join(LETTERS[label] for label in labels_of(session, sets[name, model])),
            }
            for name in session.near_misses
        }
    yield unit.cells[0], told


def _numbered(prompts: Sequence[str], *, of: Sequence[str]) -> list[int]:
    """Where each prompt stands in the set that it is of; of one that stands there twice, the first place."""
    place = {prompt: i for i, prompt in reversed(list(enumerate(of)))}
    return [place[prompt] for prompt in prompts]


def _digits(right: Sequence[bool]) -> str:
    return "".join("01"[value] for value in right)


KINDS: dict[str, Callable[[Session, Unit], Made]] = {
    "images": _images,
    "pairs": _pairs,
    "erase": _erase,
    "original": _original,
    "original_preserved": _preserved,
    "attack": _attack,
    PRESERVED: _preserved,
}


def _head(unit: Unit, cell: str) -> dict[str, Any]:
    """What every cell says of itself. No time, host or commit: cells are compared byte for byte."""
    return {
        "schema": SCHEMA,
        "bench": unit.bench,
        "method": Path(cell).parts[0],
        "strength": None if unit.point is None else unit.point.strength,
        "seed": None if unit.point is None else unit.point.seed,
        "config": _config(unit, cell),
        "versions": versions(),
        "threads": unit.threads,
    }


def _config(unit: Unit, cell: str) -> str:
    """A digest of all that decides what a cell holds, but for versions, weights of real models and the machine.

    Fields that have their defaults are left out, so that cells outlive versions of duo in which there are more.
    """
    recipe = unit.recipe
    names = [*DRAWN, *(ERASED if unit.point is not None else ()), *(["reference"] if NEVER in Path(cell).parts else ())]
    what = {name: as_said(getattr(recipe, name)) for name in (*names, "prompt_sets", "attacks")}
    what |= {"hardening": as_said(recipe.hardens)} if unit.point is not None and recipe.hardens else {}
    score, plain = recipe.score, ScoreSettings()
    kept = {name: getattr(score, name) for name in KEPT if getattr(score, name) != getattr(plain, name)}
    what |= {"reliable": score.reliable} if recipe.attacks else {"score": kept}
    return rundir.digest({**what, **_world(recipe), "threads": unit.threads})


def _world(recipe: Recipe) -> dict[str, Any]:
    return dict(_digests(recipe.concept, recipe.model))


@lru_cache
def _digests(concept: str, model: str) -> tuple[tuple[str, str | None], ...]:
    """Of the concept file's contents, and of the embedded world where that has a part."""
    loaded = load_concept(concept)
    world = world_digest(Recipe(concept=concept, model=model, erased="-"), loaded)
    return ("concept_digest", rundir.digest(as_said(loaded))), ("world_digest", world)


# --- recipes and folders of units -----------------------------------------------------------------------


def _of_row(recipe: Recipe, row: AttackRow) -> Recipe:
    """The recipe with one attack row, after the row whose prompts it takes, if any."""
    return _of_rows(recipe, (*_found_by(recipe, row), row))


def _of_rows(recipe: Recipe, rows: tuple[AttackRow, ...]) -> Recipe:
    unsafe = rows[-1].row if rows else recipe.score.unsafe_row
    # What is measured besides judges and preservation has no cell.
    return replace(recipe, attacks=rows, score=replace(recipe.score.without_besides(), unsafe_row=unsafe))


def _found_by(recipe: Recipe, row: AttackRow) -> tuple[AttackRow, ...]:
    return tuple(one for one in recipe.attacks if one.row == row.settings.get("found_by"))


def _attacked(row: AttackRow, models: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"attack/{row.row}/{model}" for model in models)


def _takes_pairs(recipe: Recipe) -> bool:
    assert recipe.method is not None
    return bool(recipe.method.make("methods", "method").takes_pairs)
