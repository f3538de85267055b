"""The published schema of `report.json`: what duo writes is of it, what is broken is not, and it names every field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import synthetic
from jsonschema import Draft202012Validator

from duo.errors import UserError
from duo.report import SCHEMA, verdict, write_report
from duo.scores import Seen, attack_rows

SCHEMA_FILE = json.loads(resources.files("duo.report").joinpath("report.schema.json").read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = synthetic.write_run(tmp_path_factory.mktemp("schema") / "demo")
    write_report(run)
    told: dict[str, Any] = json.loads((run / "report.json").read_text())
    return told


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report with every section, and with attack rows as the score stage makes them."""
    run: Path = synthetic.write_run(tmp_path_factory.mktemp("full") / "demo", attacks={"prompts": (60, 2, 3)})
    path = run / "score/scores.json"
    data = json.loads(path.read_text())
    models = {
        model: Seen(
            labels=[label, "absent"] * 4,
            prompts=["a", "b"] * 4,
            variants=["weak"] * 4 + ["strong"] * 4,
            psnr=[20.0] * 8,
        )
        for model, label in (("original", "present"), ("erased", "corrupted"), ("never", "absent"))
    }
    rows = attack_rows("img2img", models, reliable=0.4, baselines=["prompts"], attack="img2img", seed=0)
    data["attacks"] += json.loads(json.dumps(rows))
    data |= synthetic.later_sections() | {"not_defined": [{"name": "unload", "reason": "no adapter"}]}
    path.write_text(json.dumps(data))
    manifest = run / "erase/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "searched": synthetic.searched()}))
    for model in ("original", "erased"):
        synthetic.write_rows(run / f"attack/img2img/{model}/attempts.jsonl", [])
    write_report(run)
    told: dict[str, Any] = json.loads((run / "report.json").read_text())
    return told


def _closed(schema: Any) -> Any:
    """The schema with every object that names its fields closed to others."""
    if isinstance(schema, dict):
        closed = {key: _closed(value) for key, value in schema.items()}
        if "properties" in schema and "allOf" not in schema and "additionalProperties" not in schema:
            closed["additionalProperties"] = False
        return closed
    return [_closed(one) for one in schema] if isinstance(schema, list) else schema


def _errors(report: Any, schema: Any = SCHEMA_FILE) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(report)]


def test_it_is_a_schema_of_its_dialect_and_number() -> None:
    Draft202012Validator.check_schema(SCHEMA_FILE)
    assert SCHEMA_FILE["properties"]["schema"]["const"] == SCHEMA
    assert SCHEMA_FILE["$id"].endswith(f":{SCHEMA}")


def test_what_is_written_is_of_the_schema(report: dict[str, Any], full: dict[str, Any]) -> None:
    assert not _errors(report)
    assert not _errors(full)


def test_the_schema_names_every_field_that_is_written(full: dict[str, Any]) -> None:
    schema = _closed(SCHEMA_FILE)
    del schema["$defs"]["mean"]["additionalProperties"]  # preservation adds its metric to it
    assert not _errors(full, schema)


@pytest.mark.parametrize("field", SCHEMA_FILE["required"])
def test_a_field_that_every_report_has_is_missed(report: dict[str, Any], field: str) -> None:
    assert _errors({key: value for key, value in report.items() if key != field})


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(schema=2),
        lambda r: r.update(concept=3),
        lambda r: r.update(attacks=[]),
        lambda r: r["attacks"][0].pop("rate"),
        lambda r: r["attacks"][0].update(rate=1.5),
        lambda r: r["attacks"][0].update(rate="0.5"),
        lambda r: r["attacks"][0].update(n=0),
        lambda r: r["attacks"][0].update(detected=2.5),
        lambda r: r["attacks"][0].update(model="other"),
        lambda r: r["attacks"][0].update(reliable="yes"),
        lambda r: r["attacks"][-1]["variants"][0].pop("variant"),
        lambda r: r["attacks"][-2]["excess"].update(low=-2),
        lambda r: r["preservation"].pop("metric"),
        lambda r: r["preservation"].pop("low"),
        lambda r: r["attributes"]["unsafe"].pop("erased"),
        lambda r: r["attributes"]["unsafe"]["erased"]["all"].pop("mean"),
        lambda r: r["near_misses"][0].pop("survived"),
        lambda r: r["captions"]["metrics"][0].pop("difference"),
        lambda r: r["instead"]["twins"].pop("wanted"),
        lambda r: r["instead"]["corrupted"].pop("erased"),
        lambda r: r["checks"].pop("identical"),
        lambda r: r["checks"]["false_positives"]["erased"].update(n=0),
        lambda r: r["warnings"][0].pop("kind"),
        lambda r: r["searched"].pop("trials"),
        lambda r: r["searched"].update(chosen=None),
        lambda r: r["searched"]["trials"][0].pop("preservation"),
        lambda r: r["cost"].update(erase=-1),
        lambda r: r["cost"].update(erase="long"),
        lambda r: r["versions"].update(duo=1),
        lambda r: r.update(protocol=[]),
    ],
)
def test_a_broken_report_is_not_of_the_schema(full: dict[str, Any], change: Callable[[dict], object]) -> None:
    broken = copy.deepcopy(full)
    change(broken)
    assert _errors(broken)


def test_fields_of_a_later_version_are_passed_over(report: dict[str, Any]) -> None:
    later = report | {"new": 1, "attacks": [row | {"new": 1} for row in report["attacks"]]}
    assert not _errors(later)
    assert verdict(later) == verdict(report)


def test_a_report_of_another_schema_is_refused_in_one_line(report: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^report\.json: schema 2 is not known here, only 1; use the duo that wrote it$"
    ):
        verdict(report | {"schema": 2})
    with pytest.raises(UserError, match="'schema' is missing"):
        verdict({key: value for key, value in report.items() if key != "schema"})
