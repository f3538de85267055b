"""A bench's grid, and its cells on a tiny model with random weights: what they hold, what is shared, what survives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import staged
from duo import cli, engines, rundir
from duo.bench import Grid, bench_names, chosen, lay_out, load_bench
from duo.engines import here, on_ray
from duo.errors import UserError
from duo.recipe import recipe_names
from duo.stages import Session, attack, benching, erase, make_pairs, score

BENCH = """
recipe = "recipe.toml"
budget = "rows.toml"
seeds = [3, 4]
[methods.nudge]
recipe = "recipe.toml"
strength = "method.size"
values = [0.5, 4.0]
[methods.once]
recipe = "recipe.toml"
set = ["method.size=1.0"]
seeds = [3]
"""
ROWS = f"""
attack_images = 3
[score]
unrelated = 3
near_miss = 2
{staged.ROWS}"""
POINTS = ["nudge/0.5/seed-3", "nudge/4/seed-3", "once/as-it-is/seed-3", "nudge/0.5/seed-4", "nudge/4/seed-4"]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a bench beside its recipe, concept and rows, and returns its path."""

    def write_one(bench: str = BENCH, rows: str = ROWS) -> Path:
        for name, text in {
            "fire.toml": staged.CONCEPT,
            "recipe.toml": staged.RECIPE,
            "rows.toml": rows,
            "bench.toml": bench,
        }.items():
            (tmp_path / name).write_text(text)
        return tmp_path / "bench.toml"

    return write_one


@pytest.fixture
def grid(quick_leaves: None, write: Callable[..., Path], tiny_sd: Any, monkeypatch: pytest.MonkeyPatch) -> Grid:
    """The bench above on the tiny model."""
    monkeypatch.setattr(benching, "_model", lambda *_: tiny_sd)
    return lay_out(load_bench(write()))


def make(grid: Grid, out: Path, *, engine: Any = here, **more: Any) -> Path:
    benching.run(grid, out=out, results=out / "results", device="cpu", engine=engine, **more)
    return out / "results"


def cells(results: Path) -> dict[str, bytes]:
    """Every finished cell, by its name."""
    return {str(path.relative_to(results)): path.read_bytes() for path in sorted(results.rglob("*/*.json"))}


def cell(results: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = rundir.read_json(results / f"{name}.json")
    return read


# --- the file and the grid ------------------------------------------------------------------------------


def test_a_grid_has_every_strength_of_every_seed_seeds_outermost(grid: Grid) -> None:
    assert [point.name for point in grid.points] == POINTS
    assert [point.recipe.erase_seed for point in grid.points] == [3, 3, 3, 4, 4]
    assert [point.recipe.method.settings["size"] for point in grid.points if point.recipe.method] == [0.5, 4, 1, 0.5, 4]
    assert grid.rows == ("prompts", "bell", "inversion")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("values = [0.5, 4.0]", ""), "strength and values go together"),
        (("values = [0.5, 4.0]", "values = [0.5, 0.5]"), "two are the same"),
        (("seeds = [3, 4]", "seeds = []"), "seeds is empty"),
        (("seeds = [3, 4]", "seeds = [3, 3]"), "different whole numbers"),
        (("seeds = [3, 4]", "seeds = [-1]"), "from 0 up"),
        (("seeds = [3]", "seeds = [-1]"), "methods.once: seeds are [-1]"),
        (("seeds = [3]", "seeds = []"), "methods.once: seeds is empty"),
        (("seeds = [3, 4]", "seeds = [3, 4]\nattacks = []"), "attacks is empty"),
        (("method.size=1.0", "erase_seed=5"), "erase_seed is what seeds say"),
        (("method.size=1.0", "score.adherence='none'"), "methods.once has another score"),
        (("seeds = [3, 4]", "seeds = [3, 4]\nthreads = 0"), "threads is 0"),
        (("methods.once", "methods.original"), "methods.original: the name is a folder's"),
        (("methods.once", 'methods."a/b"'), "methods.a/b: the name is a folder's"),
        (('budget = "rows.toml"', 'budget = "rows.toml"\nname = "x"'), "no field 'name'"),
        (("set = [", "sett = ["), "methods.once has no field 'sett' (did you mean 'set'"),
        (('set = ["method.size=1.0"]', 'set = ["sampling.guidance_scale=2"]'), "methods.once has another sampling"),
        (('set = ["method.size=1.0"]', 'set = ["seed=9"]'), "methods.once has another seed"),
        (
            ("values = [0.5, 4.0]", 'values = [0.5, "much"]'),
            "bench.toml: methods.nudge at method.size = \"much\": method.size is 'much', expected a number",
        ),
        (
            ("method.size=1.0", "method.sise=1.0"),
            "bench.toml: methods.once: method has no field 'sise' (did you mean 'size'?)",
        ),
    ],
)
def test_a_mistake_in_a_bench_is_told(
    quick_leaves: None, write: Callable[..., Path], change: tuple[str, str], told: str
) -> None:
    path = write(BENCH.replace(*change, 1))
    with pytest.raises(UserError, match=re.escape(told)) as error:
        lay_out(load_bench(path))
    assert "\n" not in str(error.value)


def test_a_row_may_not_have_the_name_of_a_folder(quick_leaves: None, write: Callable[..., Path]) -> None:
    path = write(rows=ROWS.replace('row = "bell"', 'row = "preserved"'))
    with pytest.raises(UserError, match="'preserved', which is the name of a folder"):
        lay_out(load_bench(path))


def test_an_unknown_bench_is_told_with_a_guess() -> None:
    with pytest.raises(UserError, match=r"no bench is called 'toybox-figure5' .did you mean 'toybox-figure4'"):
        load_bench("toybox-figure5")


@pytest.mark.parametrize("name", bench_names())
def test_the_shipped_benches_can_be_laid_out(name: str) -> None:
    grid = lay_out(load_bench(name))
    assert len(grid.points) == len({point.name for point in grid.points}) > 1
    assert {one.recipe for one in grid.bench.methods.values()} <= set(recipe_names())


def test_erasures_are_chosen_by_the_beginning_of_their_names(grid: Grid) -> None:
    assert [point.name for point in chosen(grid.points, ["nudge/0.5"])] == [POINTS[0], POINTS[3]]
    assert [point.name for point in chosen(grid.points, ["once", POINTS[4]])] == [POINTS[2], POINTS[4]]
    with pytest.raises(UserError, match=r"--only: no erasure is called 'nudge/0' .did you mean 'nudge/0.5/seed-\d'"):
        chosen(grid.points, ["nudge/0"])
    with pytest.raises(UserError, match=r"--only: no erasure is called 'nugde' .did you mean 'nudge'"):
        chosen(grid.points, ["nugde"])


# --- the cells --------------------------------------------------------------------------------------------


def test_cells_say_what_a_run_of_the_same_recipe_scores(grid: Grid, tmp_path: Path, tiny_sd: Any) -> None:
    """The oracle: the stages as `duo run` calls them, which share nothing."""
    results = make(grid, tmp_path / "out")
    point = next(one for one in grid.points if one.name == "nudge/4/seed-4")
    session = Session(point.recipe, tmp_path / "run", model=tiny_sd)
    make_pairs(session)
    erase(session)
    attack(session)
    scores = score(session)
    for row in scores["attacks"]:
        found = cell(results, f"{point.name if row['model'] == 'erased' else 'original'}/{row['name']}")
        assert found["labels"].count("p") == row["detected"]
        assert found["labels"].count("c") == row["corrupted"]
        assert len(found["labels"]) == len(found["prompts"]) == len(found["variants"]) == row["n"]
        assert found["queries"] == row["queries"]
    kept = cell(results, f"{point.name}/preserved")
    values = kept["preservation"]["values"]
    assert kept["preservation"]["metric"] == "1 - difference"
    assert sum(values) / len(values) == pytest.approx(scores["preservation"]["mean"], abs=1e-6)
    for name, share in scores["attributes"]["unrelated"]["erased"].items():
        assert kept["attributes"]["unrelated"][name].count("1") == round(share["mean"] * share["n"])
    for near in scores["near_misses"]:
        where = point.name if near["model"] == "erased" else "original"
        told = cell(results, f"{where}/preserved")["near_misses"][near["name"]]
        assert told["survived"].count("1") == round(near["survived"]["mean"] * near["n"])
        assert told["labels"].count("p") == round(near["hazard_rate"] * near["n"])


def test_a_cell_tells_what_it_is_of_and_no_time(grid: Grid, tmp_path: Path) -> None:
    results = make(grid, tmp_path / "out", only=["nudge/4/seed-3"])
    found = cell(results, "nudge/4/seed-3/bell")
    assert found["strength"] == {"field": "method.size", "value": 4.0, "label": "4"}
    assert (found["schema"], found["method"], found["seed"], found["row"], found["attack"], found["reliable"]) == (
        1,
        "nudge",
        3,
        "bell",
        "text_search",
        0.9,
    )
    assert found["prompts"] == [0, 1, 0, 1]
    assert not {"seconds", "started", "host", "pid"} & found.keys()
    assert cell(results, "original/bell")["strength"] is None
    assert "preservation" not in cell(results, "original/preserved")


def test_a_preserved_cell_tells_prompts_only_where_they_repeat(
    grid: Grid, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """Three unrelated images of two prompts, and two of two."""
    several = make(grid, tmp_path / "out", only=["once"])
    assert cell(several, "once/as-it-is/seed-3/preserved")["prompts"] == [0, 1, 0]
    assert cell(several, "original/preserved")["prompts"] == [0, 1, 0]
    single = lay_out(load_bench(write(rows=ROWS.replace("unrelated = 3", "unrelated = 2"))))
    assert "prompts" not in cell(make(single, tmp_path / "two", only=["once"]), "once/as-it-is/seed-3/preserved")


def test_what_is_shared_is_made_once(grid: Grid, tmp_path: Path) -> None:
    results = make(grid, tmp_path / "out")
    done = [row["unit"] for row in rundir.read_jsonl(results / "timings.jsonl")]
    assert len(done) == len(set(done))
    assert len([name for name in done if name.startswith("pairs/")]) == 2  # one set a seed, for five erasures
    work = tmp_path / "out" / "work"
    first = (work / "original" / "bell" / "attack" / "bell" / "original" / "images" / "0000.png").stat()
    copies = [work / name / "bell" / "attack" / "bell" / "original" / "images" / "0000.png" for name in POINTS]
    assert {path.stat().st_ino for path in copies} == {first.st_ino}
    # One search a prompt serves the original and all erasures, which leave the text encoder alone.
    assert staged.TextSearch.searched == ["a boat", "a car"]


def test_a_bench_that_was_stopped_goes_on_and_ends_with_the_same_cells(grid: Grid, tmp_path: Path) -> None:
    whole = cells(make(grid, tmp_path / "whole"))

    def dies_after(left: int, units: Sequence[Any], work: Callable[[Any], None], told: Callable[[Any], None]) -> None:
        for unit in units[:left]:
            work(unit)
            told(unit)
        raise KeyboardInterrupt

    for left in (1, 9, 17):
        with pytest.raises(KeyboardInterrupt):
            make(grid, tmp_path / "out", engine=partial(dies_after, left))
    results = make(grid, tmp_path / "out")
    assert cells(results) == whole
    done = [row["unit"] for row in rundir.read_jsonl(results / "timings.jsonl")]
    assert len(done) == len(set(done))  # nothing was made twice


def test_finished_cells_stand_without_their_folders(grid: Grid, tmp_path: Path) -> None:
    results = make(grid, tmp_path / "one", only=["nudge"])
    told = benching.outlook(grid, out=tmp_path / "two", results=results)
    assert told[-1] == "20 of 24 cells are finished; 11 pieces of work are left"  # the shared ones are to be made again
    assert benching.outlook(grid, out=tmp_path / "one", results=results)[-1].endswith("5 pieces of work are left")
    benching.run(grid, out=tmp_path / "two", results=results, device="cpu", engine=here)
    assert not (tmp_path / "two" / "work" / "nudge").exists()
    assert cells(results) == cells(make(grid, tmp_path / "whole"))


def test_cells_of_other_settings_are_refused(grid: Grid, tmp_path: Path, write: Callable[..., Path]) -> None:
    results = make(grid, tmp_path / "out", only=["once"])
    before = cells(results)
    other = lay_out(load_bench(write(rows=ROWS.replace("images = 5", "images = 6"))))
    with pytest.raises(UserError, match=r"original/prompts\.json is of other settings than bench 'bench' has now"):
        make(other, tmp_path / "out")
    assert cells(results) == before


@pytest.mark.parametrize("name", ["bench.json", "original/prompts.json"])
def test_results_of_another_schema_are_left_alone(grid: Grid, tmp_path: Path, name: str) -> None:
    results = make(grid, tmp_path / "out", only=["once"])
    path = results / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"{name}: schema 2 is not known here, only 1; use the duo .* results$"):
        make(grid, tmp_path / "out", only=["once"])
    assert path.read_bytes() == before


def test_the_results_of_another_bench_are_left_alone(grid: Grid, tmp_path: Path, write: Callable[..., Path]) -> None:
    results = make(grid, tmp_path / "out", only=["once"])
    before = cells(results) | {"bench.json": (results / "bench.json").read_bytes()}
    renamed = tmp_path / "mine.toml"
    renamed.write_text(write().read_text())
    with pytest.raises(UserError, match=r"bench\.json is of another bench than 'mine'"):
        make(lay_out(load_bench(renamed)), tmp_path / "out")
    assert cells(results) | {"bench.json": (results / "bench.json").read_bytes()} == before


def test_an_attack_that_is_not_defined_leaves_a_cell_that_says_why(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duo.errors import NotDefinedError

    def refuse(*_: Any, **__: Any) -> None:
        raise NotDefinedError("no words here")

    monkeypatch.setattr(staged.LearnedWord, "prepare", refuse)
    results = make(grid, tmp_path / "out", only=["once"])
    found = cell(results, "once/as-it-is/seed-3/inversion")
    assert found["not_defined"] == "no words here" and "labels" not in found


# --- Ray and the command line -------------------------------------------------------------------------------

FIRE = """
recipe = "toybox-fire"
budget = "rows.toml"
seeds = [0]
[methods.uce]
recipe = "toybox-fire-uce"
strength = "method.erase_scale"
values = [0.01, 3.4]
"""
FIRE_ROWS = """
attack_images = 2
[score]
unrelated = 2
near_miss = 0
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 3
[[attacks]]
row = "img2img"
name = "img2img"
prompts = "neutral"
images = 2
searches = 1
ask = "empty"
strengths = [0.5, 0.9]
"""


def test_two_workers_of_ray_make_the_same_bytes(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    fire = lay_out(load_bench(write(FIRE, FIRE_ROWS)))
    ours = cells(make(fire, tmp_path / "here"))
    theirs = cells(make(fire, tmp_path / "ray", engine=partial(on_ray, workers=2)))
    assert len(ours) == 3 + 2 * 3
    assert theirs == ours
    hosts = {row["pid"] for row in rundir.read_jsonl(tmp_path / "ray" / "results" / "timings.jsonl")}
    assert len(hosts) == 2


def test_what_goes_wrong_in_a_worker_of_ray_is_told_as_here(tmp_path: Path, write: Callable[..., Path]) -> None:
    pytest.importorskip("ray")
    rows = FIRE_ROWS.replace('name = "img2img"', 'name = "concept_inversion"').partition("ask =")[0]
    fire = lay_out(load_bench(write(FIRE, rows + 'vectors = 1\ninitializers = ["zzzqq"]\nrestarts = 1\nsteps = 1\n')))
    with pytest.raises(UserError) as told:
        make(fire, tmp_path / "here")
    with pytest.raises(UserError) as by_ray:
        make(fire, tmp_path / "ray", engine=partial(on_ray, workers=1))
    assert str(by_ray.value) == str(told.value)


def test_a_worker_of_ray_that_dies_is_told_in_one_line(tmp_path: Path) -> None:
    """Ray in small: its first unit is done, and the worker of the second dies."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        pass

    def get(name: str) -> None:
        if name == "second":
            raise RayError("The worker died unexpectedly.\nIts log lies elsewhere.")

    task = SimpleNamespace(remote=lambda unit: unit.name)
    ray = SimpleNamespace(
        remote=lambda _: SimpleNamespace(options=lambda **_: task),
        cluster_resources=lambda: {"CPU": 1},
        wait=lambda running, num_returns: (running[:num_returns], []),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError),
    )
    units = [SimpleNamespace(name=name, needs={}, threads=1) for name in ("first", "second")]
    told: list[str] = []
    with pytest.raises(UserError) as error:
        engines._all(ray, units, lambda unit: None, lambda unit: told.append(unit.name), gpus=0)
    assert told == ["first"]
    assert str(error.value) == (
        "--engine ray: second was not done: The worker died unexpectedly; finished cells are kept, and the same "
        "command goes on (with fewer --workers where memory is short)"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--workers", "2"], "add --engine ray"),
        (["--engine", "ray", "--workers", "0"], "'0' is no whole number from 1 up"),
        (["--only", "nobody", "--dry-run"], "no erasure is called 'nobody'"),
        (["--engine", "dask"], "invalid choice"),
    ],
)
def test_misuse_is_told_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "toybox-figure4", "--out", str(tmp_path / "out"), *arguments]) == cli.MISUSE
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing(
    tmp_path: Path, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(FIRE, FIRE_ROWS)
    assert cli.main(["bench", str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "original: 0 of 3 cells are finished",
        "uce: 0 of 6 cells are finished",
        "shared work left: images that attacks learn from (1), erasures (2)",
        "0 of 9 cells are finished; 12 pieces of work are left",
    ]
    assert not (tmp_path / "out").exists()


def test_an_outlook_tells_hours_by_the_times_of_pieces_alike(grid: Grid, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for unit, seconds in (
        ("images", 36.0),
        ("original/prompts", 72.0),
        ("nudge/0.5/seed-3/erase", 9.0),  # stopped: a part of the next
        ("nudge/0.5/seed-3/erase", 360.0),
        ("nudge/0.5/seed-3/bell", 100.0),
        ("nudge/4/seed-3/bell", 200.0),
        ("gone/0.5/seed-3/bell", 9999.0),
    ):
        rundir.append_jsonl(results / benching.TIMINGS, {"unit": unit, "seconds": seconds})
    told = benching.outlook(grid, out=tmp_path / "out", results=results, only=["nudge/0.5/seed-4", "once"])
    assert told == [
        "original: 0 of 4 cells are finished",
        "nudge: 0 of 4 cells are finished",
        "once: 0 of 4 cells are finished",
        "shared work left: images that attacks learn from (1), pairs (2), erasures (2)",
        # images 36, prompts of the original 72, two erasures 360 each, two of bell 150 each: 1128 seconds. The eleven
        # others: two sets of pairs, three cells of the original, and of each erasure three.
        "about 0.3 hours are left, one piece after the other, by the times in "
        f"{results / 'timings.jsonl'}; 11 pieces are like none there, and not in it",
        "0 of 12 cells are finished; 17 pieces of work are left",
    ]


def test_a_bench_that_is_killed_between_a_cell_and_the_end_of_its_unit_lacks_nothing(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit whose cells are there is not begun again: what says that its folder is whole must be there before them."""
    every = benching.units(grid)
    out = tmp_path / "out"
    cells = {out / "results" / cell: name for name, unit in every.items() for cell in unit.cells}
    written: list[Path] = []
    write_json = rundir.write_json

    def writing(path: Path, value: object) -> None:
        if path in cells:
            assert (out / "work" / cells[path] / "done").exists()
            written.append(path)
        write_json(path, value)

    monkeypatch.setattr(rundir, "write_json", writing)
    make(grid, out)
    assert set(written) == set(cells)
