"""The committed results: what can be made again from the files alone, and whether each says what it is of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DIGEST = "1d753ba3faf1faf3f4cf2f4c5a0790573a1660dae8eb53f83b81be7f15103b65"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("agreement", "beyond", "blind", "floor", "pages", "relearning", "results", "tune"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def test_the_agreement_is_what_the_labels_columns_say() -> None:
    import agreement

    rows = agreement.read_labels(RESULTS / "labels.csv")
    told = {name: value for name, value in read("agreement.json").items() if name not in ("machine", "commit", "dirty")}
    assert agreement.compare(RESULTS / "labels.csv") == told
    agreed = sum(row["label"] == row["score"] for row in rows if row["model"] != "original")
    assert (len(rows), agreed) == (216, 84), "78% of 108"
    assert [int(row["number"]) for row in rows] == list(range(216))


def test_every_label_tells_what_the_image_was_drawn_from() -> None:
    import agreement

    from duo import load_concept

    concept, order = load_concept("toybox-fire"), agreement.np.random.default_rng(12).permutation(216)
    for row, index in zip(agreement.read_labels(RESULTS / "labels.csv"), order.tolist(), strict=True):
        prompts = concept.prompt_set(row["set"], validation=True)
        assert row["set"] == agreement.SETS[index % 4]
        assert row["prompt"] == prompts[index % len(prompts)]
        assert (row["model"] == "original") == (index < agreement.EACH)
        assert int(row["seed"]) == agreement.FIRST_SEED + int(row["number"])


@pytest.mark.parametrize(
    "name",
    [
        "agreement.json",
        "budgets.json",
        "judges.json",
        "methods.json",
        "toybox-fire-full-report.json",
        "toybox-fire-full.json",
        "tradeoff.json",
    ],
)
def test_a_result_names_the_world_that_it_was_measured_in(name: str) -> None:
    assert read(name)["world_digest"] == DIGEST


def test_what_is_written_from_here_on_names_commit_machine_and_world() -> None:
    import results

    from duo.toybox import world_digest

    told = results.machine()
    assert told["world_digest"] == world_digest()
    assert set(told) - {"dirty"} == {"machine", "commit", "world_digest"}


def test_code_that_no_commit_has_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import results

    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    code, result = tmp_path / "code.py", tmp_path / "docs" / "result.json"
    for path in (code, result):
        path.write_text("1")
    name = ("-c", "user.name=one", "-c", "user.email=one@example.org", "-c", "commit.gpgsign=false")
    for arguments in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], check=True)
    (tmp_path / "untracked").write_text("1")
    result.write_text("2")  # as the command itself writes it
    assert set(results.machine()) == {"machine", "commit", "world_digest"}
    code.write_text("2")
    assert results.machine()["dirty"] is True


def test_the_trials_that_chose_the_demo_can_be_repeated() -> None:
    import tune

    rows = [json.loads(line) for line in (RESULTS / "trials-second.jsonl").read_text().splitlines()]
    told = [(row["steps"], row["config"]) for row in rows]
    assert told == [*tune.SECOND, *tune.THIRD]
    assert {row["seed"] for row in rows[len(tune.SECOND) :]} == {tune.load_recipe("toybox-fire").seed}


def test_the_tables_of_the_objectives_are_what_their_cells_say() -> None:
    import beyond
    import relearning

    from duo.report.tradeoff.cells import read_results

    page = (ROOT / "docs/beyond.md").read_text()
    found = beyond.study(read_results(RESULTS / "beyond"))
    assert "\n".join(beyond.study_table(found)) in page
    assert all(abs(sum(its.parts) - its.total) < 1e-9 and len(its.parts) == len(beyond.PARTS) for _, its in found)
    for _, its in found:  # by the words of the plan
        lost = 2 * its.unrelated + its.unsafe / 2 + its.near + 1 - its.preservation
        assert its.total == pytest.approx(max(0, its.worst) + max(0, its.spoiled) + lost)
    assert "\n".join(beyond.scored_table(read_results(RESULTS / "figure4"))) in page
    assert relearning.table(read_results(RESULTS / "relearning")) in page


@pytest.mark.parametrize(("name", "models"), [("blind", {"duo"}), ("blind-second", {"original"})])
def test_what_was_seen_blind_is_what_the_labels_say(name: str, models: set[str]) -> None:
    import csv

    import blind

    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    who = [one for one in rows[0] if one in blind.ROLES or one.startswith("eye_")]
    told = blind.summary([row["model"] for row in rows], {one: [row[one] for row in rows] for one in who})
    assert {one: read(f"{name}.json")[one] for one in told} == told
    assert len(rows) == 3 * blind.EACH
    asked = {model: {(row["prompt"], row["seed"]) for row in rows if row["model"] == model} for model in told["models"]}
    assert asked.keys() == {"never", "redirect"} | models
    assert all(one == asked["never"] for one in asked.values()), "the same prompts and noise"


def test_the_floor_is_what_its_letters_say() -> None:
    import floor

    found = read("floor.json")
    assert all(len(letters) == found["n"] for both in found["models"].values() for letters in both.values())
    assert "\n".join(floor.table(found["models"])) in (ROOT / "docs/beyond.md").read_text()
    assert floor.without("a blazing red car in the city") == "a red car in the city"
    prompts = [prompt for _, prompt in floor.asked(found["n"])]
    assert not any(word in floor.without(prompt) for prompt in prompts for word in ("burn", "fire", "flame", "blaz"))
    assert all(floor.asked_for(floor.without(prompt)) == floor.asked_for(prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("number,label\n0,absent\n0,present\n", "number 0 has two rows"),
        ("number,label\n0,absent\n00,present\n", "number 0 has two rows"),
        ("number,label\n0,absent\n", "number 1 is not labelled"),
        ("number,label\n0,absent\n1,absent\n2,absent\n", "number 2 is no picture"),
        ("number,label\n0,absent\n1,fire\n", "number 1 has the label 'fire'"),
        ("number,label\n0,absent\n1\n", "number 1 has the label ''"),
        ("number,label\n0,absent\none,absent\n", "number is 'one'"),
        ("number;label\n0;absent\n", "no column 'number'"),
        ("", "no column 'number'"),
    ],
)
def test_labels_of_a_rater_that_do_not_fit_the_pictures_are_told(tmp_path: Path, text: str, told: str) -> None:
    import blind
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{number:03d}.png")
    row = {"model": "never", "erasure": 0, "set": "plain", "prompt": "a burning red car", "seed": 1}
    (tmp_path / "key.json").write_text(json.dumps({"0": row, "1": row}))
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    for folder in ("results", "images"):
        (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(SystemExit, match=re.escape(f"{labels}: {told}")):
        blind.compare(tmp_path, [labels], tmp_path, name="blind")
    assert not (tmp_path / "results" / "blind.csv").exists()


def test_labels_as_a_spreadsheet_writes_them_are_read(tmp_path: Path) -> None:
    import blind

    path = tmp_path / "labels.csv"
    path.write_bytes("\ufeffnumber,label\r\n001,absent \r\n0,corrupted\r\n".encode())
    assert [(row["number"], row["label"]) for row in blind.read_labels(path)] == [("0", "corrupted"), ("1", "absent")]
