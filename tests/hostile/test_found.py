"""What hostile files were found to do, one by one, so that it stays mended."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ordeal
import pytest
import sealed
import torch
from safetensors.torch import save_file

from duo import recipe, red_team
from duo.artefacts import find_artefact
from duo.checkpoint import read_tensors, write_tensors
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import read_toml
from duo.foreign import DEEPEST, json_value, read_text, refuse_deep
from duo.models import denoiser_config, family_of
from duo.pairs import PairFiles
from duo.report import write_report
from duo.report.json_fields import read_object, read_rows
from duo.rundir import RunDir, Stage, read_json, read_jsonl
from duo.stages.attacking import _Search
from duo.training import _resume, _save

DEEP = "[" * 100_000 + "]" * 100_000


# --- JSON and TOML ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1)]
)
def test_json_that_is_too_deep_is_no_value(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than"):
        json_value(text)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e999]", '{"a": ' + "9" * 101 + "}"])
def test_json_with_a_number_that_nothing_holds_is_no_value(text: str) -> None:
    with pytest.raises(ValueError, match="it holds"):
        json_value(text)


def test_json_that_is_sound_is_what_python_reads() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"], "b": {"c": 18446744073709551615}}'
    assert json_value(text) == json_value(text.encode()) == json.loads(text)
    refuse_deep([[[]]] * 1000)
    assert json_value("[" * DEEPEST + "]" * DEEPEST)


def test_every_reader_of_json_refuses_what_is_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(DEEP + "\n")
    for read in (read_json, read_jsonl, lambda one: list(read_rows(one)), read_object):
        with pytest.raises(UserError, match="nested more than"):
            read(path)
    (tmp_path / "config.json").write_text(DEEP)
    (tmp_path / "model_index.json").write_text(DEEP)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(DEEP)
    with pytest.raises(UserError, match="nested more than"):
        family_of(str(tmp_path))
    with pytest.raises(UserError, match="nested more than"):
        denoiser_config(str(tmp_path), "unet")
    (tmp_path / "model_index.json").unlink()
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="nested more than"):
        find_artefact(str(tmp_path))


def test_a_config_of_a_network_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list, expected an object"):
        denoiser_config(str(tmp_path), "unet")


def test_a_broken_row_of_pairs_is_told_however_deep(tmp_path: Path) -> None:
    for side in ("unsafe", "safe"):
        (tmp_path / side).mkdir()
    (tmp_path / "pairs.jsonl").write_text(DEEP + "\n")
    assert any("line 1: not a JSON object" in one for one in PairFiles.find(tmp_path).problems)


def test_toml_whose_dotted_names_go_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("concept = 'x'\n" + ".".join(["a"] * 900) + " = 1\n")
    with pytest.raises(UserError, match="nested more than"):
        read_toml(path)
    with pytest.raises(UserError, match="nested more than"):
        recipe.load_recipe(path)


@pytest.mark.parametrize("text", ["{} = 1", "[{}]", "x = {{{} = 1}}"])
def test_toml_of_endless_names_is_refused_at_once(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text.format(".".join(["a"] * 100_000)))
    assert "nested more than" in str(ordeal.endure("TOML bytes", lambda: read_toml(path), writes=tmp_path))


def test_a_toml_text_of_many_dots_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(f'a = "{"." * 5000}"\n')
    assert read_toml(tmp_path / "x.toml") == {"a": "." * 5000}


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(path, encoding="utf-8-sig") == path.read_text(encoding="utf-8-sig") == "a\nb\nc\n"


# --- records of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 5, "x", [1], None])
def test_a_stage_that_was_begun_with_no_table_is_told(tmp_path: Path, value: Any) -> None:
    stage = Stage(tmp_path)
    stage.partial.write_text(json.dumps({"schema": 1, "config": {"pairs": value}}))
    with pytest.raises(UserError, match="was made with pairs"):
        stage.begin({"pairs": {"max_tries": 2}}, may_rise=("pairs.max_tries",))
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "recipe": {"pairs": value}}))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "partial.json").write_text("{}")
    with pytest.raises(UserError, match=r"has recipe\.pairs"):
        RunDir(tmp_path).describe(
            {"recipe": {"pairs": {"max_tries": 2}}}, fixed={"pairs": ("pairs",)}, may_rise=("pairs.max_tries",)
        )


def test_a_log_whose_steps_are_lists_is_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    rows = [{"step": [1], "loss": 1.0}, {"step": [1], "loss": 2.0}, {"loss": 3.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage.finish()
    assert read_jsonl(tmp_path / "log.jsonl") == rows[1:]


@pytest.mark.parametrize("number", [math.nan, math.inf, "1e999"])
def test_a_number_that_is_none_never_reaches_the_report(tmp_path: Path, number: Any) -> None:
    run = sealed.write_run(tmp_path / "run", attacks={"prompts": (1, 0, 0)})
    path = run / "score" / "scores.json"
    text = path.read_text().replace('"protocol": {', '"protocol": {"x": "@",', 1)
    text = text if "@" in text else text.rstrip().removesuffix("}") + ', "protocol": {"x": "@"}}'
    path.write_text(text.replace('"@"', json.dumps(number) if isinstance(number, float) else number))
    sealed.seal(run)
    with pytest.raises(UserError, match=r"scores.json is not valid JSON"):
        write_report(run)


@pytest.mark.parametrize("digests", [None, 5, ["x"]])
def test_digests_that_are_no_table_are_told(tmp_path: Path, digests: Any) -> None:
    run = sealed.write_run(tmp_path / "run", attacks={"prompts": (1, 0, 0)})
    sealed.edit(run / "score" / "manifest.json", {"digests": digests})
    for read in (lambda: RunDir(run).scores(), lambda: write_report(run)):
        with pytest.raises(UserError, match=r"score/manifest.json has digests that are no table"):
            read()


def test_a_set_of_prompts_that_no_baseline_can_be_called_by_is_told() -> None:
    row = recipe.AttackRow(row="p4d", name="p4d", prompts="=cmd()")
    with pytest.raises(UserError, match=r"attack p4d: prompts is '=cmd\(\)'"):
        red_team.with_baselines([row], {})


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["[1]", "1", '"x"', DEEP])
def test_a_record_of_tensors_that_is_no_object_is_refused(tmp_path: Path, record: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"duo": record})
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64])
def test_a_delta_of_other_numbers_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "delta.safetensors"
    tensors = {f"unet.m.lora_{half}.weight": torch.ones(1, 1).to(dtype) for half in "AB"}
    write_tensors(path, tensors, {"schema": 1, "kind": "lora"})
    with pytest.raises(UserError, match="which no erasure is"):
        Delta.load(path)


@pytest.mark.parametrize("shape", [(), (4,), (4, 4)])
def test_a_checkpoint_whose_first_layer_is_none_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(shape)}, path)
    refusal = ordeal.endure("tensors", lambda: family_of(str(path)), writes=tmp_path)
    assert "no text-to-image model" in str(refusal) or len(shape) == 2


STATE: dict[str, Any] = {
    "no generator": lambda tensors, record: tensors.pop("generator"),
    "another generator": lambda tensors, record: tensors.update(generator=torch.ones(4)),
    "a short generator": lambda tensors, record: tensors.update(generator=torch.ones(4, dtype=torch.uint8)),
    "a step that is a text": lambda tensors, record: record.update(step="1"),
    "a step below 0": lambda tensors, record: record.update(step=-1),
    "no step": lambda tensors, record: record.pop("step"),
    "moments of others": lambda tensors, record: tensors.update({"optimizer.7.exp_avg": torch.ones(1)}),
    "moments of another shape": lambda tensors, record: tensors.update({"optimizer.0.exp_avg": torch.ones(9)}),
    "moments without a number": lambda tensors, record: tensors.update({"optimizer.x.exp_avg": torch.ones(9)}),
    "moments without a name": lambda tensors, record: tensors.update({"optimizer.0": torch.ones(9)}),
    "weights of another shape": lambda tensors, record: tensors.update({"module.adapter.0": torch.ones(9)}),
    "a run that is no table": lambda tensors, record: record.update(run=[1]),
}


@pytest.mark.parametrize("what", STATE)
def test_a_state_of_training_that_is_damaged_is_told(tmp_path: Path, what: str) -> None:
    parameters = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))])
    optimizer, generator = torch.optim.AdamW(parameters, lr=0.1), torch.Generator()
    sum(one.sum() for one in parameters).backward()
    optimizer.step()
    _save(tmp_path, 1, parameters, optimizer, generator, {"model": "tiny"})
    assert _resume(tmp_path, parameters, optimizer, generator, {"model": "tiny"}, {}) == 1
    (path,) = tmp_path.iterdir()
    tensors, record = read_tensors(path)
    STATE[what](tensors, record)
    write_tensors(path, tensors, record)
    with pytest.raises(UserError, match=r"cannot be resumed from|was made with another"):
        _resume(tmp_path, parameters, optimizer, generator, {"model": "tiny"}, {})


SEARCH: dict[str, Any] = {
    "weights elsewhere": lambda tensors, record: record["attempts"][0].update(weights="../../x"),
    "a prompt that is none": lambda tensors, record: record["attempts"][0].update(prompt=5),
    "attempts that are none": lambda tensors, record: record.update(attempts=5),
    "an attempt that is none": lambda tensors, record: record.update(attempts=["x"]),
    "a record that is none": lambda tensors, record: record["attempts"][0].update(record=5),
    "refused that is none": lambda tensors, record: record.update(refused=[5]),
    "queries that are none": lambda tensors, record: record.update(queries="x"),
    "a picture of floats": lambda tensors, record: tensors.update({"0.init": torch.ones(4, 4, 3)}),
    "a picture that is none": lambda tensors, record: tensors.update({"0.init": torch.ones(9, dtype=torch.uint8)}),
    "a word that is none": lambda tensors, record: tensors.update({"0.token.<c>": torch.ones(3)}),
}


@pytest.mark.parametrize("what", SEARCH)
def test_a_search_that_is_damaged_is_told(tmp_path: Path, what: str) -> None:
    path = tmp_path / "search" / "0000.safetensors"
    plain = {"prompt": "a", "negative_prompt": None, "variant": "", "strength": 0.5, "weights": "w", "unloaded": False}
    record: dict[str, Any] = {"attempts": [{**plain, "record": {}}], "base_prompt": "a", "refused": [], "queries": 1}
    tensors = {"0.token.<c>": torch.ones(1, 8), "0.init": torch.zeros(4, 4, 3, dtype=torch.uint8)}
    write_tensors(path, tensors, record)
    assert _Search.load(path).attempts[0].weights == "w"
    SEARCH[what](tensors, record)
    write_tensors(path, tensors, record)
    with pytest.raises(UserError, match="was made by another version of duo"):
        _Search.load(path)
