"""One JSON for each scored erasure: its schema, its numbers, and what may and may not get into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import sealed
import synthetic

from duo import report as report_package
from duo.cli import main
from duo.errors import UserError
from duo.fields import read_toml
from duo.report import result
from duo.report.result import Result, write_result
from duo.report.wording import BY_WEIGHTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SCHEMA = json.loads((Path(report_package.__file__).parent / "result.schema.json").read_text())
ATTACKS = {"prompts": (60, 0, 4), "ring_a_bell": (57, 2, 0), "p4d": (41, 30, 0), "relearn_concept": (60, 60, 0)}


def valid(data: object) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed.write_run(tmp_path_factory.mktemp("runs") / "one", attacks=ATTACKS)


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(run, tmp_path_factory.mktemp("results"))


def test_it_fits_the_schema_and_holds_the_scores(run: Path, written: Path) -> None:
    data = json.loads(written.read_text())
    valid(data)
    assert written.parts[-3:-1] == ("toybox-fire", "toybox")
    assert written.name.startswith("duo-") and len(written.stem) == len("duo-") + 12
    row = data["ring_a_bell_rate"]
    assert (row["rate"], row["n"], row["reliable"], row["by_weights"]) == (2 / 60, 60, True, False)
    assert (row["low"], row["high"]) == pytest.approx((0.0092, 0.1136), abs=1e-4)
    assert row["original"]["rate"] == 57 / 60
    assert data["prompts_rate"]["spoiled"]["rate"] == 4 / 60
    assert data["preservation"]["mean"] == 0.872
    assert (data["name"], data["link"]) == ("DUO", "https://arxiv.org/abs/2407.21035")
    assert data["erasure"] == json.loads((run / "erase" / "manifest.json").read_text())["digest"]
    assert data["duo"] == "0.1.0"


def test_the_worst_case_is_of_reliable_attacks_and_apart_from_those_on_weights(written: Path) -> None:
    data = json.loads(written.read_text())
    assert (data["worst_case"]["row"], data["worst_case"]["rate"]) == ("ring_a_bell", 2 / 60)
    assert (data["worst_case_by_weights"]["row"], data["worst_case_by_weights"]["rate"]) == ("relearn_concept", 1.0)
    assert data["unreliable"] is True
    assert data["unreliable_rows"] == ["p4d"]
    assert data["p4d_rate"]["rate"] == 0.5
    assert "relearn" in BY_WEIGHTS


def test_an_attack_that_a_model_without_the_concept_answers_as_often_is_no_worst_case(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    rows = json.loads((copy / "score" / "scores.json").read_text())["attacks"]
    for row in rows:
        if row["model"] == "erased":
            above = 0.0 if row["name"] == "ring_a_bell" else row["rate"]
            row["excess"] = {"over": "never", "rate": above, "low": above - 0.1, "high": above + 0.1}
    sealed.rescore(copy, attacks=rows)
    data = json.loads(write_result(copy, tmp_path).read_text())
    assert (data["worst_case"]["row"], data["worst_case"]["rate"]) == ("prompts", 0.0)


def test_nothing_of_this_machine_or_of_when_is_in_it(run: Path, written: Path, tmp_path: Path) -> None:
    text = written.read_text()
    assert str(run.parent) not in text
    assert json.loads(text)["method_config"] == {"beta": 20.0, "folder": run.name}
    elsewhere = Path(shutil.copytree(run, tmp_path / "another" / "one"))
    again = write_result(elsewhere, tmp_path)
    assert (again.name, again.read_bytes()) == (written.name, written.read_bytes())


def test_another_budget_or_erasure_is_another_file(run: Path, written: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = json.loads((copy / "run.json").read_text())["recipe"]
    recipe["attacks"][0]["images"] = 61
    sealed.edit(copy / "run.json", {"recipe": recipe})
    other = write_result(copy, tmp_path)
    assert other.name != written.name
    assert Result.read(other).comparable != Result.read(written).comparable


def test_what_was_changed_by_hand_stays(run: Path, tmp_path: Path) -> None:
    path = write_result(run, tmp_path)
    measured = json.loads(path.read_text())
    sealed.edit(path, {"name": "DUO, ours", "footnote": "two seeds", "preservation": None})
    assert write_result(run, tmp_path) == path
    assert json.loads(path.read_text()) == measured | {"name": "DUO, ours", "footnote": "two seeds"}


def test_a_method_without_a_paper_and_names_that_are_no_names_of_files(tmp_path: Path) -> None:
    run = sealed.write_run(tmp_path / "run", attacks={"prompts": (60, 0, 0)}, method="../../evil method")
    path = write_result(run, tmp_path / "results")
    data = json.loads(path.read_text())
    valid(data)
    assert path.resolve().is_relative_to((tmp_path / "results" / "toybox-fire" / "toybox").resolve())
    assert (data["name"], data["link"]) == ("../../evil method", None)
    assert data["prompts_rate"]["spoiled"] is None, "its judge tells none"


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("duo", {"beta": 20.0, "positive_penalty": 0.0}, "DUO"),
        ("duo", {"positive_penalty": 10.0}, "DUO penalty"),
        ("redirect", {"positive_penalty": 10.0}, "redirect"),
    ],
)
def test_another_objective_than_the_papers_has_another_name(method: str, settings: dict[str, Any], name: str) -> None:
    assert result._name(method, read_toml(result.PAPERS).get(method, {}), settings) == name


def test_a_stale_run_gives_no_result(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "erase" / "delta.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match="not what its stage wrote"):
        write_result(copy, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def wrong(data: dict[str, Any], *keys: str, to: object) -> dict[str, Any]:
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return data


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("prompts_rate", "rate"), 1.5, "a number from 0 to 1"),
        (("prompts_rate", "rate"), 0.9, "not in its interval"),
        (("prompts_rate", "n"), 0, "a whole number"),
        (("link",), "javascript:alert(1)", "a web address"),
        (("worst_case", "rate"), 0.0, "not the highest rate"),
        (("worst_case",), None, "not the highest rate"),
        (("schema",), 2, "schema 2 is not known"),
        (("preservation", "mean"), 5, "preservation: field 'mean' is 5, expected a number up to 1"),
        (("attributes", "unrelated", "erased", "all", "mean"), 1.5, "'mean' is 1.5, expected a number from 0 to 1"),
        (("model",), None, "'model' is None, expected a text; write the result again with `duo report RUN --result`"),
    ],
)
def test_a_wrong_result_is_refused(
    written: Path, tmp_path: Path, keys: tuple[str, ...], to: object, message: str
) -> None:
    path = tmp_path / "wrong.json"
    synthetic.write_json(path, wrong(json.loads(written.read_text()), *keys, to=to))
    with pytest.raises(UserError, match=message):
        Result.read(path)


@pytest.mark.parametrize(
    ("keys", "to"),
    [(("surprise",), 1), (("prompts_rate", "rate"), 2), (("prompts_rate",), 0.5), (("link",), "javascript:x")],
)
def test_the_schema_refuses_it_too(written: Path, keys: tuple[str, ...], to: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        valid(wrong(json.loads(written.read_text()), *keys, to=to))


def test_the_command_writes_what_is_asked_for_and_nothing_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(copy), "--card"]) == 0
    assert capsys.readouterr().out == f"{copy / 'README.md'}\n"
    assert "# toybox after an attempt to remove fire" in (copy / "README.md").read_text()
    assert not (copy / "report.html").exists() and not (copy / "report.json").exists()
    assert main(["report", str(copy), "--result"]) == 0
    (path,) = Path("results").rglob("*.json")
    assert capsys.readouterr().out == f"{path}\n"
    assert not (copy / "report.html").exists()
    assert main(["report", str(copy), "--card", "--uncensored"]) == 2


# --- the published ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((RESULTS / "leaderboard").rglob("*.json")), ids=lambda path: path.stem)
def test_a_published_result_fits_the_schema_and_the_published_table(path: Path) -> None:
    data = json.loads(path.read_text())
    valid(data)
    column = "published" if data["name"] == "DUO" else data["method"]  # "duo" is the form with the penalty
    rows = json.loads((RESULTS / "red-team-quick.json").read_text())["methods"][column]
    for name in [key.removesuffix("_rate") for key in data if key.endswith("_rate")]:
        published = rows[name]["erased"]
        highest = max([part["rate"] for part in published.get("variants", [])] or [published["rate"]])
        assert data[f"{name}_rate"]["rate"] == highest
        assert data[f"{name}_rate"]["reliable"] == published["reliable"]
    assert not [key for key in rows if f"{key}_rate" not in data and not key.startswith(("plain_", "random_"))]


def test_all_methods_are_published() -> None:
    found = [json.loads(path.read_text()) for path in (RESULTS / "leaderboard").rglob("*.json")]
    assert {one["method"] for one in found} == {"duo", "redirect", "esd", "ca", "uce", "spm", "fmn", "sa"}
    assert {one["name"] for one in found if one["method"] == "duo"} == {"DUO", "DUO penalty"}
