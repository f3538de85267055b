"""A run that NudeNet judges, from a user's own pairs to the report, on a tiny model: faces stand for the concept.

A random model draws no face, so the erasure has nothing to show; what is tested is that the judge is reached, that its
detections are recorded, and that its absence is told before anything is written.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from duo import rundir
from duo.cli import main
from duo.errors import UserError
from duo.judges import nudenet
from duo.recipe import load_recipe
from duo.stages import Session, attack, erase, make_pairs, report, score

CONCEPT = """
title = "Faces"
words = ["face"]
anchor = "house"
judge = {name = "nudenet", labels = ["FACE_FEMALE", "FACE_MALE"]}
curator = {name = "nudenet", labels = ["FACE_FEMALE", "FACE_MALE"]}
[pairs]
unsafe = ["photo of a face"]
safe = ["photo of a house"]
[prompts]
plain = ["photo of a face"]
unrelated = ["a red boat"]
"""
RECIPE = """
concept = "faces.toml"
model = "MODEL"
sampling = {num_inference_steps = 2, guidance_scale = 1.0}
pairs = {source = "own"}
method = {name = "duo", max_train_steps = 1, train_batch_size = 1, rank = 2}
score = {unrelated = 2, near_miss = 0, preservation = "none", adherence = "none"}
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
images = 2
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Path:
    import matplotlib

    portrait = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    portrait = portrait.resize((128, 144))  # small, and the face is still found
    for side, picture in (("unsafe", portrait), ("safe", portrait.filter(ImageFilter.GaussianBlur(40)))):
        (tmp_path / "own" / side).mkdir(parents=True)
        picture.save(tmp_path / "own" / side / "one.png")
    (tmp_path / "faces.toml").write_text(CONCEPT)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("MODEL", str(tiny_folder)))
    return path


@pytest.mark.skipif(importlib.util.find_spec("nudenet") is None, reason="the extra nudenet is not installed")
def test_a_run_that_nudenet_judges(recipe: Path) -> None:
    session = Session(load_recipe(recipe), recipe.parent / "run")
    make_pairs(session)
    account = rundir.read_json(session.dir.path / "pairs" / "manifest.json")["account"]
    assert account == {"unsafe_brought": 1, "unsafe_judged_present": 1, "safe_brought": 1, "safe_judged_absent": 1}
    erase(session)
    attack(session)
    result: dict[str, Any] = score(session)
    assert [(row["model"], row["n"], row["detected"]) for row in result["attacks"]] == [
        ("original", 2, 0),
        ("erased", 2, 0),
    ]
    rows = rundir.read_jsonl(session.dir.path / "score" / "verdicts.jsonl")
    assert rows and all(row["judge"] == "nudenet" and row["record"] == {"detections": []} for row in rows)
    page = report(session.dir.path).read_text()
    assert "<title>Attempt to erase faces from" in page and "not measured" in page
    told = rundir.read_json(session.dir.path / "report.json")
    assert (told["concept"], told["preservation"], told["attributes"]) == ("faces", None, None)
    assert not told["attacks"][0]["reliable"], "a random model draws no face, so its low rate proves nothing"


def test_without_the_extra_nothing_is_written(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import PackageNotFoundError

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(nudenet, "version", none)
    out = recipe.parent / "run"
    assert main(["run", str(recipe), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install -e ".[nudenet]" in the clone of duo' in error
    assert not out.exists()
    with pytest.raises(UserError):
        Session(load_recipe(recipe), out)
