"""A bench: methods × strengths × seeds × attack rows, as a grid of cells. No torch until a grid is laid out.

    recipe = "toybox-fire"           # what all contenders share: concept, model, sampling, scored prompts and noise
    budget = "bench"                 # of the recipe's red team (`duo.red_team`), or a .toml file: the attack rows
    attacks = ["all"]                # of the budget, by attack or row
    baselines = false                # true: also the rows that the red team sets beside its attacks
    seeds = [0, 1, 2]                # of pairs and training (`Recipe.erase_seed`); what is scored stays the same
    threads = 1                      # of each cell on the CPU: with as many, cells come out byte for byte the same

    [methods.duo]                    # a contender: a recipe, and the one field of it that is its strength
    recipe = "toybox-fire-duo"
    set = ["method.rank=16"]         # overrides, as --set gives them
    strength = "method.beta"
    values = [6, 12, 24]
    seeds = [0]                      # in place of the bench's: for a method in which chance has no part

A cell is one attack row on one erasure, or what one erasure kept ("preserved"). A contender without a strength has one
point. Paths are from the file's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duo.errors import UserError, did_you_mean
from duo.fields import as_table, build, read_toml
from duo.recipe import NOT_MEASURED, Recipe, load_recipe
from duo.red_team import ALL, red_team

SCHEMA = 1  # of bench.json and the cells
FOLDER = Path(__file__).parent / "benches"
PRESERVED = "preserved"  # the cell of what an erasure kept
ORIGINAL, NEVER = "original", "never"
TAKEN = (PRESERVED, "erase", "pairs", "images", ORIGINAL, NEVER)  # names of folders that are no contender's or row's
KEPT = (
    "unrelated",
    "near_miss",
    "preservation",
    "adherence",
)  # of the scores' settings: what a preserved cell depends on
SHARED = ("concept", "model", "model_config", "seed", "validation", "sampling", "precision", "block", "attack_images")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A recipe, and the field of it that is swept as its strength."""

    recipe: str
    set: tuple[str, ...] = ()
    strength: str | None = None
    values: tuple[int | float | str | bool, ...] = ()
    seeds: tuple[int, ...] | None = None  # in place of the bench's; one is enough for a method without chance

    def __post_init__(self) -> None:
        if (self.strength is None) != (not self.values):
            raise ValueError("strength and values go together; give both, or neither")
        if len({_label(value) for value in self.values}) != len(self.values):
            raise ValueError(f"values are {list(self.values)}, of which two are the same")
        if self.seeds is not None:
            _check_seeds(self.seeds)
        fixed = next(
            (text for text in (self.strength or "", *self.set) if text.partition("=")[0] == "erase_seed"), None
        )
        if fixed is not None:
            raise ValueError("erase_seed is what seeds say; leave it out of set and strength")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A bench file. The module's docstring shows every field."""

    recipe: str
    budget: str
    methods: Mapping[str, Contender]
    seeds: tuple[int, ...]
    attacks: tuple[str, ...] = (ALL,)
    baselines: bool = False
    threads: int = 1
    name: str = ""
    folder: str = field(default="")  # where its paths start

    def __post_init__(self) -> None:
        for what, values in (("methods", self.methods), ("attacks", self.attacks)):
            if not values:
                raise ValueError(f"{what} is empty; give at least one")
        _check_seeds(self.seeds)
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        for name in self.methods:
            if not name.replace("_", "").replace("-", "").isalnum() or name in TAKEN:
                raise ValueError(
                    f"methods.{name}: the name is a folder's; take letters, digits, _ and -, none of {', '.join(TAKEN)}"
                )

    @property
    def file(self) -> Path:
        """The bench's own file."""
        return Path(self.folder) / f"{self.name}.toml"

    def path(self, name: str) -> str:
        """A recipe or budget as the file names it, found from the file's folder."""
        return str(Path(self.folder) / name) if name.endswith(".toml") else name


@dataclass(frozen=True, kw_only=True)
class Point:
    """One erasure of a grid: a contender at one strength, of one seed."""

    method: str
    label: str  # of the strength, as its folder is called
    seed: int
    recipe: Recipe
    field: str | None = None
    value: Any = None

    @property
    def name(self) -> str:
        """Its folder, in the order that cells are named by."""
        return f"{self.method}/{self.label}/seed-{self.seed}"

    @property
    def strength(self) -> dict[str, Any] | None:
        return None if self.field is None else {"field": self.field, "value": self.value, "label": self.label}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A bench laid out: the recipe that all share, with the rows, and every erasure."""

    bench: Bench
    shared: Recipe
    points: tuple[Point, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The attack rows, by name."""
        return tuple(row.row for row in self.shared.attacks)

    def record(self) -> dict[str, Any]:
        """What the cells are of, for `bench.json`."""
        return {
            "schema": SCHEMA,
            "name": self.bench.name,
            "rows": [{"row": row.row, "attack": row.name, "prompts": row.prompts} for row in self.shared.attacks],
            "methods": {name: as_table(one) for name, one in self.bench.methods.items()},
            "seeds": list(self.bench.seeds),
            "threads": self.bench.threads,
            "recipe": as_table(self.shared),
        }


def bench_names() -> list[str]:
    """The benches in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_bench(name: str | Path) -> Bench:
    """A shipped bench by name, or a file by its path (recognised by the ending `.toml`)."""
    path = Path(name) if Path(name).suffix == ".toml" else FOLDER / f"{name}.toml"
    if path.parent == FOLDER and path.stem not in bench_names():
        raise UserError(f"no bench is called {str(name)!r}{did_you_mean(str(name), bench_names())}")
    table = read_toml(path)
    where = f"{path}:" if path.parent != FOLDER else f"bench {name}:"
    for own in ("name", "folder"):
        if own in table:
            raise UserError(f"{where} has no field {own!r}: the file's own name and place are its")
    return replace(build(Bench, table, where), name=path.stem, folder=str(path.parent))


def lay_out(bench: Bench) -> Grid:
    """Every erasure of a bench with its recipe, seeds outermost: a grid that grows has whole methods first.

    Raises `UserError` where a contender differs from the bench's recipe in what all must share.
    """
    shared = _with_rows(bench, load_recipe(bench.path(bench.recipe)))
    bad = next((row.row for row in shared.attacks if row.row in TAKEN), None)
    if bad is not None:
        raise UserError(
            f"bench {bench.name}: an attack row is called {bad!r}, which is the name of a folder of its own"
        )
    if shared.score.preservation == NOT_MEASURED:
        raise UserError(f"bench {bench.name}: score.preservation is {NOT_MEASURED!r}; name a metric to compare by")
    settings = {name: list(_settings(bench, name, shared)) for name in bench.methods}
    points = [
        Point(
            method=name,
            label="as-it-is" if value is None else _label(value),
            seed=seed,
            recipe=replace(recipe, erase_seed=seed),
            field=one.strength,
            value=value,
        )
        for seed in _seeds(bench)
        for name, one in bench.methods.items()
        if seed in _of(bench, one)
        for value, recipe in settings[name]
    ]
    return Grid(bench=bench, shared=shared, points=tuple(points))


def _settings(bench: Bench, name: str, shared: Recipe) -> Iterator[tuple[Any, Recipe]]:
    """A contender's strengths, (None,) of one that has none, each with its recipe; seeds change nothing else of it.

    Raises `UserError` for a recipe or a value that will not do, with the bench's file and the contender.
    """
    one = bench.methods[name]
    for value in one.values or (None,):
        swept = [] if one.strength is None else [f"{one.strength}={json.dumps(value)}"]
        try:
            recipe = _with_rows(bench, load_recipe(bench.path(one.recipe), overrides=[*one.set, *swept]))
            if recipe.method is not None:
                recipe.method.make("methods", "method")  # a value that it refuses is told now
        except UserError as error:
            at = "" if one.strength is None else f" at {one.strength} = {json.dumps(value)}"
            raise UserError(f"{bench.file}: methods.{name}{at}: {error}") from error
        _same(bench, shared, name, recipe)
        yield value, recipe


def _seeds(bench: Bench) -> list[int]:
    """All seeds of a bench, in their order."""
    return list(dict.fromkeys([*bench.seeds, *(seed for one in bench.methods.values() for seed in _of(bench, one))]))


def _of(bench: Bench, one: Contender) -> tuple[int, ...]:
    return bench.seeds if one.seeds is None else one.seeds


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds:
        raise ValueError("seeds is empty; give at least one")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds are {list(seeds)}, expected different whole numbers from 0 up")


def _label(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(letter if letter.isalnum() or letter in "._-+" else "_" for letter in text)


def _with_rows(bench: Bench, recipe: Recipe) -> Recipe:
    """The recipe with the attack rows of the bench's budget."""
    whole = red_team(recipe, budget=bench.path(bench.budget), attacks=bench.attacks)
    if bench.baselines:
        return whole
    return replace(whole, attacks=tuple(replace(row, baselines=()) for row in whole.attacks if not row.baseline))


def _same(bench: Bench, shared: Recipe, method: str, recipe: Recipe) -> None:
    """What the original model draws is shared, so nothing that it depends on may differ."""
    ours, theirs = as_table(shared), as_table(recipe)
    for table in (ours, theirs):  # what a preserved cell depends on
        table["score"] = {name: table["score"][name] for name in KEPT}
    for name in (*SHARED, "attacks", "prompt_sets", "reference", "score"):
        if ours[name] != theirs[name]:
            raise UserError(
                f"bench {bench.name}: methods.{method} has another {name} than the bench's recipe "
                f"{bench.recipe!r}; all must share it"
            )


def chosen(points: Sequence[Point], only: Sequence[str]) -> list[Point]:
    """The points whose names begin with one of `only` ("duo", "duo/12", "duo/12/seed-0"); all where it is empty."""
    for name in only:
        if not any(_within(point, name) for point in points):
            its = [point.name for point in points if point.method == name.partition("/")[0]]
            known = its or dict.fromkeys(point.method for point in points)
            raise UserError(f"--only: no erasure is called {name!r}{did_you_mean(name, known)}")
    return [point for point in points if not only or any(_within(point, name) for name in only)]


def _within(point: Point, name: str) -> bool:
    return f"{point.name}/".startswith(f"{name}/")
