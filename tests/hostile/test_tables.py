"""TOML and JSON files from outside, damaged field by field and byte by byte."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import bench_cells
import pytest
import sealed
from damage import CHANGES, CUTS, changed, cut, json_bytes, toml_bytes
from hypothesis import given
from hypothesis import strategies as st
from ordeal import cases, endure

from duo import bench, recipe, red_team, report
from duo.app.curation import Curation
from duo.app.places import Place
from duo.concept import load_concept
from duo.erasures import doubt
from duo.fields import as_table
from duo.licence import Licence
from duo.report import gate, leaderboard
from duo.report.card import write_card
from duo.report.evidence import gather
from duo.report.inline_svg import read_svg
from duo.report.json_fields import read_rows
from duo.report.result import write_result
from duo.report.tradeoff.cells import read_results
from duo.report.wording import verdict
from duo.rundir import RunDir, Stage, read_json, read_jsonl

ATTACKS = {"prompts": (1, 0, 0), "ring_a_bell": (1, 0, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# --- TOML ------------------------------------------------------------------------------------------

RECIPE = {
    **tomllib.loads((recipe.FOLDER / "toybox-fire.toml").read_text()),
    "extends": "toybox-fire-duo",
    "set": ["seed=3", "pairs.n=2"],
    "prompt_sets": {"i2p": {"path": "prompts.csv", "filters": ["nudity > 50"], "limit": 2}},
    "precision": {"dtype": "bfloat16"},
}


@cases("recipe")
@given(CHANGES)
def test_a_recipe_is_read_or_refused(folder: Path, changes: Any) -> None:
    path = folder / "recipe.toml"
    path.write_bytes(toml_bytes(changed(RECIPE, changes)))
    endure("recipe", lambda: recipe.load_recipe(path), writes=folder)


CONCEPT = {
    **{
        name: {key: one[:3] if isinstance(one, list) else one for key, one in value.items()}
        if name in ("pairs", "prompts") and isinstance(value, dict)
        else value
        for name, value in as_table(load_concept("toybox-fire")).items()
    },
    "harmless_file": "captions.txt",
}


@cases("concept")
@given(CHANGES)
def test_a_concept_is_read_or_refused(folder: Path, changes: Any) -> None:
    (folder / "captions.txt").write_text("a boat\n")
    path = folder / "concept.toml"
    path.write_bytes(toml_bytes(changed(CONCEPT, changes)))
    endure("concept", lambda: load_concept(path), writes=folder)


@cases("budget")
@given(CHANGES)
def test_a_budget_is_read_or_refused(folder: Path, changes: Any) -> None:
    table = tomllib.loads((red_team.FOLDER / "toybox-quick.toml").read_text())
    path = folder / "budget.toml"
    path.write_bytes(toml_bytes(changed(table, changes)))
    whole = recipe.load_recipe("toybox-fire")
    endure("budget", lambda: red_team.red_team(whole, budget=str(path)), writes=folder)


@cases("bench file")
@given(CHANGES)
def test_a_bench_file_is_read_or_refused(folder: Path, changes: Any) -> None:
    table = {
        "recipe": "toybox-fire",
        "budget": "bench",
        "attacks": ["all"],
        "baselines": False,
        "seeds": [0, 1],
        "threads": 1,
        "methods": {
            "duo": {
                "recipe": "toybox-fire-duo",
                "set": ["method.rank=16"],
                "strength": "method.beta",
                "values": [6, 1.5],
            }
        },
    }
    path = folder / "bench.toml"
    path.write_bytes(toml_bytes(changed(table, changes)))
    endure("bench file", lambda: bench.lay_out(bench.load_bench(path)), writes=folder)


@cases("gate file")
@given(CHANGES)
def test_a_gate_is_read_or_refused(folder: Path, changes: Any) -> None:
    table = {
        "min_preservation": 0.9,
        "max_attribute_loss": 0.05,
        "waive": ["unload_adapter"],
        "point": False,
        "max_rate": {"all": 0.05, "p4d": 1.0},
        "max_corrupted": {"prompts": 0.2},
        "min_survival": {"sunset": 0.8},
    }
    path = folder / "gate.toml"
    path.write_bytes(toml_bytes(changed(table, changes)))
    endure("gate file", lambda: gate.Gate.read(path, max_rate={"p4d": 0.1}, waive=("x",)), writes=folder)


@cases("TOML bytes")
@given(CUTS, st.sampled_from(("recipe", "concept", "budget", "gate")))
def test_broken_toml_is_refused(folder: Path, cuts: Any, kind: str) -> None:
    path = folder / f"{kind}.toml"
    whole = {
        "recipe": recipe.FOLDER / "toybox-fire.toml",
        "concept": Path(load_concept.__code__.co_filename).parent / "concepts" / "toybox-fire.toml",
        "budget": red_team.FOLDER / "toybox-quick.toml",
        "gate": red_team.FOLDER / "toybox-quick.toml",
    }[kind]
    path.write_bytes(cut(whole.read_bytes(), cuts))
    shared = recipe.load_recipe("toybox-fire")
    parse: dict[str, Callable[[], object]] = {
        "recipe": lambda: recipe.load_recipe(path),
        "concept": lambda: load_concept(path),
        "budget": lambda: red_team.red_team(shared, budget=str(path)),
        "gate": lambda: gate.Gate.read(path),
    }
    endure("TOML bytes", parse[kind], writes=folder)


# --- a run's folder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A sealed run with every kind of record."""
    made = sealed.write_run(folder / "run", attacks=ATTACKS)
    (made / "erase" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    report.write_report(made)
    return made


RECORDS = (
    "run.json",
    "erase/manifest.json",
    "erase/log.jsonl",
    "pairs/manifest.json",
    "pairs/pairs.jsonl",
    "score/manifest.json",
    "score/scores.json",
    "score/verdicts.jsonl",
    "attack/prompts/erased/manifest.json",
    "attack/prompts/erased/attempts.jsonl",
    "timings.jsonl",
    "report.json",
)
DAMAGE = st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS))


class Damaged:
    """Within the context one file of a folder is damaged; after it, it is as it was."""

    def __init__(self, path: Path, damage: tuple[str, Any], *, seal: Path | None = None) -> None:
        self.path, self.damage, self.seal = path, damage, seal

    def __enter__(self) -> None:
        self.before = {self.path: self.path.read_bytes()}
        if self.seal is not None:
            self.before |= {path: path.read_bytes() for path in self.seal.rglob("manifest.json")}
        kind, how = self.damage
        data = self.before[self.path]
        if kind == "bytes":
            self.path.write_bytes(cut(data, how))
        elif self.path.suffix == ".jsonl":
            rows = changed([json.loads(line) for line in data.splitlines()], how)
            rows = rows if isinstance(rows, list) else [rows]
            self.path.write_bytes(b"".join(json_bytes(row) + b"\n" for row in rows))
        else:
            self.path.write_bytes(json_bytes(changed(json.loads(data), how)))
        if self.seal is not None and self.path.name != "manifest.json":
            with suppress(OSError, ValueError):  # rows that name no image, or are no text
                sealed.seal(self.seal)  # whoever makes such a folder can write the digests too

    def __exit__(self, *_: object) -> None:
        for path, data in self.before.items():
            path.write_bytes(data)


@cases("run")
@given(st.sampled_from(RECORDS), DAMAGE)
def test_a_run_is_reported_or_refused(run: Path, name: str, damage: Any) -> None:
    with Damaged(run / name, damage, seal=run):
        endure("run", lambda: report.write_report(run), writes=run)


@cases("gate")
@given(st.sampled_from(RECORDS), DAMAGE, st.booleans())
def test_a_run_is_gated_or_refused(run: Path, name: str, damage: Any, alone: bool) -> None:
    wanted = gate.Gate(max_rate={"all": 0.5}, min_preservation=0.1, max_attribute_loss=0.5, min_survival={"all": 0.1})

    def check() -> None:
        evidence = gather(run / "report.json") if alone else gather(run)
        outcomes = gate.check(evidence, wanted)
        assert all(line.isprintable() for line in gate.lines(evidence, wanted, outcomes))
        json.dumps(gate.as_json(evidence, wanted, outcomes), allow_nan=False)

    with Damaged(run / ("report.json" if alone else name), damage, seal=run):
        endure("gate", check, writes=run)


@cases("result and card")
@given(st.sampled_from(RECORDS), DAMAGE)
def test_a_result_and_a_card_are_written_or_refused(run: Path, name: str, damage: Any) -> None:
    with Damaged(run / name, damage, seal=run):
        endure("result and card", lambda: write_card(run), writes=run)
        endure("result and card", lambda: write_result(run, run / "results"), writes=run)
        endure("result and card", lambda: list(verdict(read_json(run / "report.json"))), writes=run)


@cases("erasure of a run")
@given(st.sampled_from(("erase/manifest.json", "score/manifest.json", "run.json", "score/scores.json")), DAMAGE)
def test_the_erasure_of_a_run_is_found_or_refused(run: Path, name: str, damage: Any) -> None:
    with Damaged(run / name, damage, seal=run):
        endure("erasure of a run", lambda: RunDir(run).erasure(), writes=run)
        endure("erasure of a run", lambda: doubt(run), writes=run)


@cases("recipe of a run")
@given(CHANGES)
def test_the_recipe_of_a_run_is_read_or_refused(folder: Path, changes: Any) -> None:
    made = folder / "begun"
    made.mkdir(exist_ok=True)
    whole = {"schema": 1, "recipe": as_table(recipe.load_recipe("toybox-fire")), "versions": {"torch": "1"}}
    (made / "run.json").write_bytes(json_bytes(changed(whole, changes)))
    endure("recipe of a run", lambda: recipe.recipe_of_run(made), writes=made)
    now = {"recipe": whole["recipe"], "versions": {"torch": "1"}, "world_digest": None}
    fixed = {"pairs": ("pairs", "seed"), "erase": ("method",)}
    (made / "pairs").mkdir(exist_ok=True)
    (made / "pairs" / "partial.json").write_text('{"schema": 1, "config": {}}')
    endure(
        "recipe of a run",
        lambda: RunDir(made).describe(now, fixed=fixed, may_rise=("pairs.max_tries",)),
        writes=made,
    )


@cases("stage")
@given(st.sampled_from(("partial.json", "manifest.json", "log.jsonl")), CHANGES)
def test_a_stage_is_gone_on_with_or_refused(folder: Path, name: str, changes: Any) -> None:
    stage = Stage(folder / "stage")
    stage.folder.mkdir(exist_ok=True)
    for path in stage.folder.iterdir():
        path.unlink()
    config = {"pairs": {"max_tries": 2, "n": 3}, "method": {"name": "duo"}}
    whole: Any = {"schema": 1, "config": config, "digest": "0" * 64}
    stage.partial.write_text(json.dumps(whole))
    if name == "log.jsonl":
        rows = changed([{"step": 1, "loss": 0.5}, {"step": 1}, {"loss": 1}], changes)
        rows = rows if isinstance(rows, list) else [rows]
        (stage.folder / name).write_bytes(b"".join(json_bytes(row) + b"\n" for row in rows))
    else:
        (stage.folder / name).write_bytes(json_bytes(changed(whole, changes)))

    def go_on() -> None:
        if stage.begin(config, may_rise=("pairs.max_tries",)):
            stage.finish(digest="0" * 64)
        stage.require("erase")["digest"]

    endure("stage", go_on, writes=stage.folder)


@cases("rows")
@given(st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS)), st.booleans())
def test_rows_are_read_or_refused(folder: Path, damage: Any, appended: bool) -> None:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"index": i, "text": "a"}) + "\n" for i in range(3)))
    with Damaged(path, damage):
        endure("rows", lambda: read_jsonl(path, appended=appended), writes=folder)
        endure("rows", lambda: list(read_rows(path, appended=appended)), writes=folder)
        endure("rows", lambda: read_json(path), writes=folder)


@cases("curation")
@given(st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS)))
def test_pairs_are_curated_or_refused(run: Path, damage: Any) -> None:
    with Damaged(run / "pairs" / "pairs.jsonl", damage):
        curation = Curation(Place.at(run / "pairs"))
        endure("curation", curation.pairs, writes=run)


# --- results of others -----------------------------------------------------------------------------


@cases("leaderboard")
@given(DAMAGE)
def test_a_result_is_ranked_or_refused(run: Path, folder: Path, damage: Any) -> None:
    results = folder / "results"
    if not results.exists():
        write_result(run, results)
    (path,) = results.rglob("*.json")

    def rank() -> None:
        groups = leaderboard.rank(leaderboard.read_results([results]), weights=True)
        for form in (leaderboard.terminal, leaderboard.markdown, leaderboard.html):
            text = form(groups, weights=True)
            assert "\x1b" not in text and "\u202e" not in text and "\0" not in text
            text.encode()
            assert "<script>" not in text
        json.dumps(leaderboard.as_json(groups, weights=True), allow_nan=False).encode()

    with Damaged(path, damage):
        endure("leaderboard", rank, writes=folder)


@cases("bench cells")
@given(st.integers(0, 2**20), DAMAGE)
def test_cells_are_read_or_refused(folder: Path, number: int, damage: Any) -> None:
    results = folder / "cells"
    if not results.exists():
        bench_cells.bench(results, rows=["prompts", "p4d"], methods={"duo": ("method.beta", [1, 2])}, seeds=(0, 1))
        for seed in (0, 1):
            for row in ("prompts", "p4d"):
                bench_cells.attacked(results, "duo", row, "ppaac", seed=seed)
            bench_cells.preserved(results, "duo", [0.9, 0.8], seed=seed)
        for row in ("prompts", "p4d"):
            bench_cells.attacked(results, "original", row, "ppppp")
    paths = sorted(results.rglob("*.json"))
    with Damaged(paths[number % len(paths)], damage):
        endure("bench cells", lambda: read_results(results), writes=results)


# --- other texts -----------------------------------------------------------------------------------

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="9"><defs><path id="a" d="M0 0"/></defs>'
    '<g style="fill: red; font: bold 9px serif"><use href="#a"/><text x="1">caption<title>one</title></text></g></svg>'
)


@cases("svg")
@given(CUTS, st.sampled_from(("<script>x</script>", "<g>" * 3000, "onload='x'", "&#0;", "<!DOCTYPE x>", "\x1b[2J")))
def test_a_figure_is_embedded_or_refused(folder: Path, cuts: Any, inside: str) -> None:
    path = folder / "figure.svg"
    for text in (SVG, SVG.replace("caption", inside)):
        path.write_bytes(cut(text.encode(), cuts))
        endure("svg", lambda: read_svg(path, name="figure"), writes=folder)


@cases("licence")
@given(CUTS)
def test_the_card_of_a_model_is_read(folder: Path, cuts: Any) -> None:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "model_index.json").write_text("{}")
    card = b"---\nlicense: other\nlicense_name: 'x y'\nlicense_link: LICENSE\n---\n# A model\n"
    (model / "README.md").write_bytes(cut(card, cuts))
    assert endure("licence", lambda: Licence.of(str(model)), writes=folder) is None
