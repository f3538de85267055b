"""A run folder of somebody else that is gone on with: every stage reads what the stages before it left."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import CHANGES, CUTS, changed, cut, json_bytes
from hypothesis import given
from hypothesis import strategies as st
from ordeal import WANTED, accepted, cases, endure

import staged
from duo import plugins
from duo.recipe import load_recipe
from duo.stages import Session, report

STAGES = (
    "attack/images",
    "attack/bell/original",
    "attack/bell/erased",
    "pairs",
    "erase",
    "attack/inversion/erased",
    "score",
)


@pytest.fixture(scope="module")
def leaves() -> Iterator[None]:
    """As `quick_leaves`, for all cases of the module."""
    with pytest.MonkeyPatch.context() as patch:
        load = plugins.load
        patch.setattr(plugins, "load", lambda kind, name: staged.LEAVES.get((kind, name)) or load(kind, name))
        yield


@pytest.fixture(scope="module")
def whole(leaves: None, make_tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished run, whose records of blocks are kept where a stage was killed before it gathered them."""
    from duo.families.sd import Sd

    root = tmp_path_factory.mktemp("resumed")
    (root / "fire.toml").write_text(staged.CONCEPT)
    (root / "recipe.toml").write_text(staged.RECIPE)
    model = Sd(make_tiny_pipeline(), name="tiny")
    staged.all_stages(Session(load_recipe(root / "recipe.toml"), root / "run", model=model))
    return root, model


def go_on(root: Path, model: Any) -> None:
    session = Session(load_recipe(root / "recipe.toml"), root / "again", model=model)
    staged.all_stages(session)
    report(root / "again")


def unfinished(stage: Path) -> None:
    """As a kill before its last moment leaves a stage."""
    manifest = stage / "manifest.json"
    table = json.loads(manifest.read_text())
    (stage / "partial.json").write_text(json.dumps({name: table[name] for name in ("schema", "config")}))
    manifest.unlink()


@cases("resumed run")
@given(
    st.sampled_from(STAGES),
    st.integers(0, 2**20),
    st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS)),
    st.booleans(),
)
def test_a_run_is_gone_on_with_or_refused(whole: Any, stage: str, number: int, damage: Any, finished: bool) -> None:
    root, model = whole
    again = root / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(root / "run", again)
    if not finished:
        unfinished(again / stage)
    paths = sorted(p for p in again.rglob("*") if p.suffix in (".json", ".jsonl", ".safetensors", ".png"))
    near = [path for path in paths if path.is_relative_to(again / stage) and path.suffix != ".png"] or paths
    path = near[number % len(near)]
    kind, how = damage
    data = path.read_bytes()
    if kind == "fields" and path.suffix == ".json":
        path.write_bytes(json_bytes(changed(json.loads(data), how)))
    elif kind == "fields" and path.suffix == ".jsonl":
        rows = changed([json.loads(line) for line in data.splitlines()], how)
        path.write_bytes(b"".join(json_bytes(row) + b"\n" for row in (rows if isinstance(rows, list) else [rows])))
    elif kind == "bytes":
        path.write_bytes(cut(data, how))
    endure("resumed run", lambda: go_on(root, model), writes=again)


def test_a_sound_run_is_gone_on_with(whole: Any) -> None:
    root, model = whole
    for stage in STAGES if WANTED else STAGES[-2:]:
        shutil.rmtree(root / "again", ignore_errors=True)
        shutil.copytree(root / "run", root / "again")
        unfinished(root / "again" / stage)
        accepted("resumed run", lambda: go_on(root, model), writes=root / "again")


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/passwd", 5, None])
def test_rows_of_attack_images_lead_nowhere_else(whole: Any, name: Any) -> None:
    root, model = whole
    again = root / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(root / "run", again)
    shutil.rmtree(again / "attack" / "inversion")
    shutil.rmtree(again / "score")
    path = again / "attack" / "images" / "images.jsonl"
    rows = [json.loads(line) | {"image": name} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusal = endure("resumed run", lambda: go_on(root, model), writes=again)
    assert refusal is not None and "is not what its stage wrote" in str(refusal)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()  # as a forger would
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    refusal = endure("resumed run", lambda: go_on(root, model), writes=again)
    assert refusal is not None and "names an image that is not of its folder" in str(refusal)
