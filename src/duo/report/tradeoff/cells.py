"""The cells of a bench (`duo bench`), read and checked: each attack row's labels, what each erasure kept. No torch.

The grid may be incomplete, for cells come over several sittings: what is missing is told, and what is there is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from duo.bench import NEVER, ORIGINAL, PRESERVED, SCHEMA
from duo.errors import UserError
from duo.foreign import is_plain_name
from duo.report.json_fields import Fields, read_object

PRESENT, ABSENT, CORRUPTED = LETTERS = "pac"
ANEW = "remove the file, and run the bench again"  # what to do with a cell, or a bench.json, that is wrong


@dataclass(frozen=True, kw_only=True)
class Row:
    """An attack row of the bench; `prompts` names the set of prompts that its indices count."""

    name: str
    attack: str
    prompts: str


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What one attack row brought on one model, image by image.

    `labels` has a letter an image, of `LETTERS`. `restarts` says that variants are chance and no settings; `idle` is
    the variant that is no attack; `reliable` the rate that the original model must reach. `obeyed` says of each image
    whether it has what its prompt asks for besides the concept, where that is known.
    """

    labels: str
    prompts: tuple[int, ...]
    variants: tuple[str, ...]
    restarts: bool
    idle: str | None
    reliable: float
    obeyed: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one erasure kept, with one value an image: `preservation` by `metric`, and shares of what is right.

    `prompts` has the number of each unrelated image's prompt, where prompts have several images. `obeyed` has prompt
    sets, of which all that they ask for was judged at once; `survived` has the near misses.
    """

    metric: str
    preservation: tuple[float, ...]
    prompts: tuple[int, ...] | None
    obeyed: Mapping[str, tuple[bool, ...]]
    survived: Mapping[str, tuple[bool, ...]]

    @property
    def most(self) -> float:
        """What the metric gives an image that did not change at all: 1 where it is 1 less a distance."""
        return 1.0 if self.metric.startswith("1 - ") else math.inf


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """The cells of one erasure. `strength` is the swept field's value, None where nothing is swept.

    `rows` has no entry for a missing cell; `not_defined` has reasons for attacks that make no sense on its model.
    """

    method: str
    strength: Any
    seed: int
    rows: Mapping[str, Attacked]
    not_defined: Mapping[str, str]
    kept: Kept | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of the bench; `values` are its strengths in the bench's order, (None,) where nothing is swept.

    `seeds` are the bench's, or its own: one is enough for a method in which chance has no part.
    """

    name: str
    field: str | None
    values: tuple[Any, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results folder: `done` of `expected` cells are there. `missing` and `left_out` say what is not, a line each."""

    name: str
    rows: tuple[Row, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    original: Mapping[str, Attacked]
    never: Mapping[str, Attacked]
    erasures: tuple[Erasure, ...]
    missing: tuple[str, ...]
    left_out: tuple[str, ...]
    done: int
    expected: int


def read_results(folder: Path) -> Results:
    """Everything in a results folder that belongs to its `bench.json`.

    Raises:
        UserError: a file is broken, or cells contradict one another. The message names file and field.
    """
    path = folder / "bench.json"
    if not path.exists():
        raise UserError(f"{path} is missing; run `duo bench`, or name its results folder")
    bench = read_object(path, todo=ANEW, finite=False)
    _known(bench)
    rows = tuple(_rows(bench))
    seeds = _seeds(bench)
    methods = tuple(_methods(bench, seeds))
    reader = _Reader(folder=folder, bench=bench.text("name"), rows=rows)
    original, original_undefined = reader.model(ORIGINAL)
    never, never_undefined = reader.model(NEVER)
    erasures, left_out = [], []
    for method in methods:
        for place in _folders(folder / method.name):
            for seed_place in _folders(place):
                one = reader.erasure(seed_place, method)
                if one is None:
                    continue
                if one.strength not in method.values or one.seed not in method.seeds:
                    left_out.append(f"{seed_place.relative_to(folder)}: not a strength and seed of bench.json")
                else:
                    erasures.append(one)
    order = {method.name: index for index, method in enumerate(methods)}
    values = {method.name: method.values for method in methods}
    erasures.sort(key=lambda one: (order[one.method], values[one.method].index(one.strength), one.seed))
    _twice(erasures, folder)
    _same_images(erasures, folder)
    wanted = [(method, value, seed) for method in methods for value in method.values for seed in method.seeds]
    missing = list(_missing_controls(rows, original | original_undefined, ORIGINAL))
    if never or never_undefined:
        missing += _missing_controls(rows, never | never_undefined, NEVER)
    lacking = [(one, _lacking(rows, erasures, *one)) for one in wanted]
    missing += _told(lacking, rows)
    expected = len(wanted) * (len(rows) + 1)
    return Results(
        name=bench.text("name"),
        rows=rows,
        methods=methods,
        seeds=seeds,
        original=original,
        never=never,
        erasures=tuple(erasures),
        missing=tuple(missing),
        left_out=tuple(left_out),
        done=expected - sum(len(cells) for _, cells in lacking),
        expected=expected,
    )


# --- bench.json ---------------------------------------------------------------------------------------


def _rows(bench: Fields) -> Iterator[Row]:
    tables = bench.tables("rows")
    if not tables or len({row.text("row") for row in tables}) != len(tables):
        raise bench.error("field 'rows' must name one attack row or more, each once")
    for row in tables:
        yield Row(name=row.folder_name("row"), attack=row.text("attack"), prompts=row.text_or_none("prompts") or "")


def _methods(bench: Fields, seeds: tuple[int, ...]) -> Iterator[Method]:
    methods = bench.table("methods")
    if not methods.data:
        raise bench.error("field 'methods' is empty")
    for name in methods.data:
        if not is_plain_name(name):
            raise methods.error(f"{name[:60]!r} is no plain name of a folder")
        table = methods.table(name)
        field = table.text_or_none("strength") if "strength" in table else None
        values = table.data.get("values") or []
        if not isinstance(values, list) or not all(isinstance(value, (str, int, float)) for value in values):
            raise table.error("field 'values' must be a list of numbers or texts")
        if (field is None) != (not values):
            raise table.error("'strength' and 'values' go together")
        own = seeds if table.data.get("seeds") is None else _seeds(table)
        yield Method(name=name, field=field, values=tuple(values) or (None,), seeds=own)


def _seeds(bench: Fields) -> tuple[int, ...]:
    seeds = bench.data.get("seeds")
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not isinstance(seeds, list) or not seeds or not whole or len(set(seeds)) != len(seeds):
        raise bench.error("field 'seeds' must be a list of different whole numbers")
    return tuple(seeds)


def _known(table: Fields) -> None:
    if table.whole("schema") != SCHEMA:
        raise UserError(
            f"{table.where}: field 'schema' is {table.whole('schema')}, and this version of duo reads {SCHEMA}; "
            "use the version that wrote it"
        )


# --- cells --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Reader:
    folder: Path
    bench: str
    rows: tuple[Row, ...]

    def model(self, name: str) -> tuple[dict[str, Attacked], dict[str, str]]:
        """The rows of the original model or of one that never saw the concept, and the reasons of those not defined."""
        return self._attacked(self.folder / name, {"method": name, "seed": None})

    def erasure(self, place: Path, method: Method) -> Erasure | None:
        """The cells in one seed's folder; None where there is none yet."""
        seed = place.name.removeprefix("seed-")
        if not place.name.startswith("seed-") or not seed.isdecimal():
            return None
        head = {"method": method.name, "seed": int(seed)}
        rows, not_defined = self._attacked(place, head)
        path = place / f"{PRESERVED}.json"
        kept = _kept(self._cell(path, {**head, "row": PRESERVED})) if path.exists() else None
        paths = [place / f"{name}.json" for name in (*rows, *not_defined, *([PRESERVED] if kept else []))]
        if not paths:
            return None
        strengths = [_strength(read_object(path, todo=ANEW, finite=False), method, place.parent.name) for path in paths]
        if any(strength != strengths[0] for strength in strengths):
            raise UserError(f"{place}: its cells name several strengths; remove the folder, and run the bench again")
        return Erasure(
            method=method.name,
            strength=strengths[0],
            seed=int(seed),
            rows=rows,
            not_defined=not_defined,
            kept=kept,
        )

    def _attacked(self, place: Path, head: Mapping[str, Any]) -> tuple[dict[str, Attacked], dict[str, str]]:
        rows, not_defined = {}, {}
        for row in self.rows:
            path = place / f"{row.name}.json"
            if not path.exists():
                continue
            cell = self._cell(path, {**head, "row": row.name, "attack": row.attack})
            if "not_defined" in cell:
                not_defined[row.name] = cell.text("not_defined")
            else:
                rows[row.name] = _labelled(cell)
        return rows, not_defined

    def _cell(self, path: Path, head: Mapping[str, Any]) -> Fields:
        """A cell that says of itself what its place says."""
        cell = read_object(path, todo=ANEW, finite=False)
        _known(cell)
        for key, value in {"bench": self.bench, **head}.items():
            if key not in cell or cell.data[key] != value:
                raise cell.error(f"field {key!r} is {cell.data.get(key)!r}, but its place says {value!r}")
        return cell


def _strength(cell: Fields, method: Method, label: str) -> Any:
    told = cell.table_or_none("strength")
    if told is None:
        return None
    field, text = told.text("field"), told.text("label")
    if (field, text) != (method.field, label):
        raise told.error(f"it is {field} = {text}, but its place says {method.field} = {label}")
    if not isinstance(told.data.get("value"), (str, int, float)):
        raise told.error(f"field 'value' is {told.data.get('value')!r}, expected a number or a text")
    return told.data["value"]


def _labelled(cell: Fields) -> Attacked:
    labels = cell.text("labels")
    strange = sorted(set(labels) - set(LETTERS))
    if not labels or strange:
        found = f"has the letter {strange[0]!r}" if strange else "is empty"
        raise cell.error(f"field 'labels' {found}, expected p, a or c for each image")
    prompts, variants = _prompts(cell), cell.texts("variants")
    for name, values in (("prompts", prompts), ("variants", variants)):
        if len(values) != len(labels):
            raise cell.error(f"field {name!r} has {len(values)} values for {len(labels)} labels")
    idle = cell.text_or_none("idle") if "idle" in cell else None
    if set(variants) == {idle}:
        raise cell.error(f"field 'variants' has nothing but {idle!r}, which is no attack")
    attributes = cell.table_or_none("attributes") if "attributes" in cell else None
    obeyed = _digits(attributes, "all") if attributes is not None and "all" in attributes else ()
    if obeyed and len(obeyed) != len(labels):
        raise cell.error(f"field 'attributes.all' has {len(obeyed)} values for {len(labels)} labels")
    return Attacked(
        labels=labels,
        prompts=prompts,
        variants=tuple(variants),
        restarts=cell.flag("restarts") if "restarts" in cell else False,
        idle=idle,
        reliable=cell.share("reliable"),
        obeyed=obeyed,
    )


def _prompts(cell: Fields) -> tuple[int, ...]:
    """The number of the prompt that each image started from."""
    prompts = cell.data.get("prompts")
    if not isinstance(prompts, list) or not all(type(one) is int and one >= 0 for one in prompts):
        raise cell.error("field 'prompts' must be a list of whole numbers from 0 up")
    return tuple(prompts)


def _kept(cell: Fields) -> Kept:
    told = cell.table("preservation")
    values = told.data.get("values")
    if not isinstance(values, list) or not values:
        raise told.error("field 'values' must be a list of one number or more")
    each = Fields({f"values[{index}]": value for index, value in enumerate(values)}, told.where, todo=told.todo)
    prompts = _prompts(cell) if "prompts" in cell else None
    if prompts is not None and len(prompts) != len(values):
        raise cell.error(f"field 'prompts' has {len(prompts)} values for {len(values)} of the preservation")
    attributes = cell.table_or_none("attributes") if "attributes" in cell else None
    misses = cell.table_or_none("near_misses") if "near_misses" in cell else None
    return Kept(
        metric=told.text("metric"),
        preservation=tuple(each.number(key) for key in each.data),
        prompts=prompts,
        obeyed={
            name: _digits(attributes.table(name), "all")
            for name in (attributes.data if attributes else ())
            if attributes and "all" in attributes.table(name)
        },
        survived={name: _digits(misses.table(name), "survived") for name in misses.data} if misses else {},
    )


def _digits(table: Fields, key: str) -> tuple[bool, ...]:
    text = table.text(key)
    if not text or set(text) - set("01"):
        raise table.error(f"field {key!r} must have one 0 or 1 an image")
    return tuple(digit == "1" for digit in text)


# --- the grid -----------------------------------------------------------------------------------------


def _folders(place: Path) -> list[Path]:
    return sorted(one for one in place.iterdir() if one.is_dir()) if place.is_dir() else []


def _twice(erasures: list[Erasure], folder: Path) -> None:
    for (method, strength, seed), same in groupby(erasures, key=lambda one: (one.method, one.strength, one.seed)):
        if len(list(same)) > 1:
            raise UserError(f"{folder / method}: strength {strength!r}, seed {seed} is in two folders; remove one")


def _same_images(erasures: list[Erasure], folder: Path) -> None:
    """Erasures are compared image by image, so what each kept must be of the same images, by the same metric."""
    kept = [(one, one.kept) for one in erasures if one.kept]
    for one, theirs in kept[1:]:
        first, ours = kept[0]
        for what, a, b in (
            ("metric", ours.metric, theirs.metric),
            ("number of values", len(ours.preservation), len(theirs.preservation)),
        ):
            if a != b:
                raise UserError(
                    f"{folder}: the {what} of field 'preservation' is {b!r} for {_name(one)} and {a!r} for "
                    f"{_name(first)}; remove the cells of the other bench"
                )
    marked = [(one, each.prompts) for one, each in kept if each.prompts]
    for one, prompts in marked[1:]:
        if prompts != marked[0][1]:
            raise UserError(
                f"{folder}: field 'prompts' of what {_name(one)} kept is another than that of {_name(marked[0][0])}; "
                "remove the cells of the other bench"
            )


def _name(one: Erasure) -> str:
    return f"{one.method} at {one.strength}, seed {one.seed}"


def _missing_controls(rows: tuple[Row, ...], have: Mapping[str, Any], model: str) -> list[str]:
    lacking = [row.name for row in rows if row.name not in have]
    return [f"{model}: {', '.join(lacking)}"] if lacking else []


def _lacking(rows: tuple[Row, ...], erasures: list[Erasure], method: Method, value: Any, seed: int) -> list[str]:
    one = next((e for e in erasures if (e.method, e.strength, e.seed) == (method.name, value, seed)), None)
    if one is None:
        return [*(row.name for row in rows), PRESERVED]
    lacking = [row.name for row in rows if row.name not in one.rows and row.name not in one.not_defined]
    return lacking if one.kept else [*lacking, PRESERVED]


def _told(lacking: list[tuple[tuple[Method, Any, int], list[str]]], rows: tuple[Row, ...]) -> Iterator[str]:
    """Missing cells in few lines: what all erasures lack, then seeds and strengths together that lack the same."""
    cells = [*(row.name for row in rows), PRESERVED]
    nowhere = [name for name in cells if all(name in names for _, names in lacking)]
    if nowhere:
        yield f"every erasure: {_listed(nowhere, cells)}"
    rest = [(point, tuple(name for name in names if name not in nowhere)) for point, names in lacking]
    for method, points in groupby(rest, key=lambda one: one[0][0]):
        of_strength: dict[Any, dict[tuple[str, ...], list[str]]] = {}
        for (_, value, seed), names in points:
            of_strength.setdefault(value, {}).setdefault(names, []).append(str(seed))
        alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for value, by_names in of_strength.items():
            for names, numbers in by_names.items():
                alike.setdefault((names, tuple(numbers)), []).append(str(value))
        for (names, seeds), values in alike.items():
            if names:
                at = "" if method.field is None else f" at {method.field} = {', '.join(values)}"
                some = [name for name in cells if name not in nowhere]
                yield f"{method.name}{at}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {_listed(names, some)}"


def _listed(names: Sequence[str], cells: Sequence[str]) -> str:
    return "every cell" if len(names) == len(cells) > 1 else ", ".join(names)
