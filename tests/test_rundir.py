"""The run folder: nothing is half written, nothing is mixed, and one process at a time works in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duo import foreign, rundir
from duo.errors import UserError
from duo.rundir import Blocks, RunDir, Stage, StageRun


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    rundir.write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        rundir.write_json(tmp_path / "a.json", {"x": float("nan")})


def test_no_character_of_a_row_ends_its_line(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c\x0bd\n"}
    rundir.write_jsonl(tmp_path / "a.jsonl", [row])
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert rundir.read_jsonl(tmp_path / "a.jsonl") == [row]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rundir.append_jsonl(path, {"i": 0})
    with path.open("a") as file:
        file.write('{"i": 1')
    assert rundir.read_jsonl(path, appended=True) == [{"i": 0}]


@pytest.mark.parametrize(("content", "reason"), [('{"i": 0}\n{"i"', "cut off"), ("[1]\n", "a row is no object")])
def test_rows_that_are_broken_are_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    for read in (rundir.read_jsonl, rundir.rows_of):
        with pytest.raises(UserError, match=rf"a\.jsonl is not valid JSONL .*{reason}"):
            list(read(tmp_path / "a.jsonl"))


def test_rows_that_are_too_many_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line may be all of a file, which is then held at once."""
    monkeypatch.setattr(foreign, "LARGEST", 10)
    (tmp_path / "a.jsonl").write_text('{"long": 1}\n')
    for read in (rundir.read_jsonl, rundir.rows_of):
        with pytest.raises(UserError, match=r"a\.jsonl is not valid JSONL \(it has 12 bytes, more than 10\)"):
            list(read(tmp_path / "a.jsonl"))


def test_rows_that_cannot_all_be_made_leave_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rundir.write_jsonl(path, [{"old": 1}])

    def broken() -> Iterator[dict[str, int]]:
        yield {"new": 2}
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        rundir.write_jsonl(path, broken())
    assert rundir.read_jsonl(path) == [{"old": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_log_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    run = StageRun(folder=tmp_path, seed=0, device=torch.device("cpu"))
    run.log(step=2, loss=2.0)
    run.log(step=3, loss=1.0)
    stage.finish()
    assert rundir.read_jsonl(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]


def test_a_stage_is_finished_only_with_its_manifest(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "pairs")
    with pytest.raises(UserError, match="pairs is not finished; run `duo pairs` first"):
        stage.require("pairs")
    assert stage.begin({"n": 3})
    assert stage.begin({"n": 3}), "a stage that was stopped goes on"
    assert not stage.finished
    stage.finish(digest="d")
    assert stage.require("pairs") == {"schema": 1, "config": {"n": 3}, "digest": "d"}
    assert not stage.begin({"n": 3}), "nothing is left to do"
    assert [path.name for path in stage.folder.iterdir()] == ["manifest.json"]


def test_a_kill_between_the_manifest_and_the_end_leaves_no_trace(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    partial = stage.partial.read_bytes()
    stage.finish()
    stage.partial.write_bytes(partial)
    assert not stage.begin({})
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}'])
def test_a_record_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json has no table 'config'"):
        Stage(tmp_path).require("pairs")
    with pytest.raises(UserError, match=r"run\.json has no table 'recipe'"):
        RunDir(tmp_path).describe({"recipe": {}}, fixed={})


@pytest.mark.parametrize("finished", [False, True])
def test_another_configuration_is_refused_by_the_field_that_differs(tmp_path: Path, finished: bool) -> None:
    stage = Stage(tmp_path)
    stage.begin({"method": {"beta": 20.0}, "words": ("a",)})
    if finished:
        stage.finish()
    assert stage.begin({"method": {"beta": 20.0}, "words": ["a"]}) is not finished
    with pytest.raises(UserError, match=r"was made with method\.beta = 20\.0, not 50\.0; give that again"):
        stage.begin({"method": {"beta": 50.0}, "words": ["a"]})
    with pytest.raises(UserError, match=r"was made with rank = null, not 4"):
        stage.begin({"method": {"beta": 20.0}, "words": ["a"], "rank": 4})


DEFAULTS = {"redirect": {"named": 0.0, "layers": ("a",)}, "p4d": {"steps": 5}}  # of these alone


@pytest.mark.parametrize("finished", [False, True])
def test_a_record_from_before_a_setting_is_taken_to_have_its_default(tmp_path: Path, finished: bool) -> None:
    old = {"method": {"name": "redirect", "beta": 1.0}, "rows": [{"row": "x", "name": "p4d"}], "judge": {"name": "j"}}
    Stage(tmp_path).begin(old)
    if finished:
        Stage(tmp_path).finish()
    stage = Stage(tmp_path, DEFAULTS)
    method: dict[str, Any] = {"name": "redirect", "beta": 1.0, "named": 0.0, "layers": ["a"]}
    row: dict[str, Any] = {"row": "x", "name": "p4d", "steps": 5}
    new: dict[str, Any] = {"method": method, "rows": [row], "judge": {"name": "j"}}
    for wrong, told in (
        ({"method": method | {"named": 0.5}}, r"method\.named = null, not 0\.5"),
        ({"method": method | {"beta": 2.0}}, r"method\.beta = 1\.0, not 2\.0"),
        ({"method": method | {"rank": 4}}, r"method\.rank = null, not 4"),
        ({"rows": [row | {"steps": 6}]}, "rows = "),
        ({"judge": {"name": "j", "steps": 5}}, r"judge\.steps = null, not 5"),
    ):
        with pytest.raises(UserError, match=told):
            stage.begin(new | wrong)
    with pytest.raises(UserError, match=r"method\.named = null, not 0\.0"):
        Stage(tmp_path).begin(new)
    assert stage.begin(new) is not finished
    if not finished:
        stage.finish()
    assert stage.require("erase", new)["config"] == (old if finished else new)


def test_a_run_from_before_a_setting_goes_on_and_says_the_setting(tmp_path: Path) -> None:
    RunDir(tmp_path).describe({"recipe": {"method": {"name": "redirect"}}}, fixed={})
    run, new = RunDir(tmp_path, DEFAULTS), {"method": {"name": "redirect", "named": 0.0, "layers": ["a"]}}
    run.stage("erase").begin({})
    with pytest.raises(UserError, match=r"run\.json has recipe\.method\.named = null, not 0\.5"):
        run.describe({"recipe": {"method": new["method"] | {"named": 0.5}}}, fixed={"erase": ["method"]})
    run.describe({"recipe": new}, fixed={"erase": ["method"]})
    assert rundir.read_json(tmp_path / "run.json")["recipe"] == new


@pytest.mark.parametrize("schema", [0, 2, "1", True, None])
def test_records_of_another_schema_are_refused_in_a_line(tmp_path: Path, schema: object) -> None:
    told = r"json: schema .* is not known here, only 1; use the duo that wrote it, or start anew with another --out$"
    RunDir(tmp_path).describe({"recipe": {}}, fixed={})
    going, done = RunDir(tmp_path).stage("pairs"), RunDir(tmp_path).stage("erase")
    going.begin({})
    done.begin({})
    done.finish()
    for path in (tmp_path / "run.json", going.partial, done.manifest):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
        with pytest.raises(UserError, match=told):
            rundir.read_json(path)
    for wrong in (
        lambda: RunDir(tmp_path).describe({"recipe": {}}, fixed={}),
        lambda: going.begin({}),
        lambda: done.begin({}),
        lambda: done.require("erase"),
    ):
        with pytest.raises(UserError, match=told):
            wrong()


def test_leftovers_of_a_killed_write_are_swept(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    leftover = tmp_path / "images" / ".0003.png.99.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    stage.begin({})
    assert not leftover.exists()


def test_blocks_are_done_once(tmp_path: Path) -> None:
    parts = Blocks(tmp_path / "blocks", n=5, size=2)
    assert [list(rows) for rows in parts.pending()] == [[0, 1], [2, 3], [4]]
    parts.done(range(2, 4), {"rows": [2, 3]})
    again = Blocks(tmp_path / "blocks", n=5, size=2)
    assert [rows.start for rows in again.pending()] == [0, 4]
    assert again.records() == [{"rows": [2, 3]}]


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    other = (
        "import sys; from pathlib import Path; from duo.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*, started 20"),
            RunDir(tmp_path).locked(),
        ):
            pass
        holder.kill()
    with RunDir(tmp_path).locked():
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_run_of_other_versions_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.describe({"versions": {"torch": "2.13.0"}, "recipe": {}}, fixed={})
    with pytest.raises(UserError, match=r'versions\.torch = "2\.13\.0", not "2\.14\.0"'):
        run.describe({"versions": {"torch": "2.14.0"}, "recipe": {}}, fixed={})


def test_what_a_stage_used_is_fixed_once_it_is_begun(tmp_path: Path) -> None:
    run, fixed = RunDir(tmp_path), {"pairs": ("n",), "score": ("k",)}
    run.describe({"recipe": {"n": 1, "k": 1}}, fixed=fixed)
    run.describe({"recipe": {"n": 2, "k": 1}}, fixed=fixed)
    run.stage("pairs").begin({})
    run.describe({"recipe": {"n": 2, "k": 2}}, fixed=fixed)
    with pytest.raises(UserError, match=r"recipe\.n = 2, not 3"):
        run.describe({"recipe": {"n": 3, "k": 2}}, fixed=fixed)
    assert rundir.read_json(tmp_path / "run.json")["recipe"] == {"n": 2, "k": 2}


def test_interrupted_stages_are_timed_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.timed("pairs"):
        raise KeyboardInterrupt
    with run.timed("pairs"):
        pass
    rows = rundir.read_jsonl(tmp_path / "timings.jsonl")
    assert [row["stage"] for row in rows] == ["pairs", "pairs"]
    assert rows[0]["seconds"] >= 0


def test_progress_is_plain_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = StageRun(folder=tmp_path, seed=0, device=torch.device("cpu"))
    with run.progress(100, "erase") as bar:
        for step in range(1, 101):
            bar.update(step, loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "erase: 100/100  loss 0.5"


@pytest.mark.parametrize("read", [rundir.read_json, rundir.read_jsonl])
def test_json_that_is_nested_without_end_is_told(read: Any, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"deep\.json is not valid JSON"):
        read(tmp_path / "deep.json")


# --- what kills, full disks and second runs may not do ------------------------------------------------------


def test_a_line_for_which_there_is_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full takes a part of a line first."""
    path = tmp_path / "log.jsonl"
    rundir.append_jsonl(path, {"step": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'"):
        rundir.append_jsonl(path, {"step": 2})
    monkeypatch.undo()
    rundir.append_jsonl(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_what_a_kill_left_of_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "timings.jsonl"
    for before, wanted in (('{"a": 1}\n{"a', ['{"a": 1}']), ('{"a', []), ("", [])):
        path.write_text(before)
        rundir.append_jsonl(path, {"b": 2})
        assert path.read_text().splitlines() == [*wanted, '{"b": 2}']


def test_the_log_of_an_attack_that_starts_again_keeps_every_restart(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    run = StageRun(folder=tmp_path, seed=0, device=torch.device("cpu"))
    rows = [{"restart": name, "step": step, "loss": 1.0} for name in ("one", "two") for step in (1, 2)]
    for row in (*rows, rows[3] | {"loss": 0.5}):  # the last was written again after a resume
        run.log(**row)
    stage.finish()
    assert rundir.read_jsonl(tmp_path / "log.jsonl") == [*rows[:3], rows[3] | {"loss": 0.5}]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*0001\.png'"):
        rundir.write_bytes(tmp_path / "0001.png", b"")


def test_a_kill_as_a_stage_ends_leaves_no_trace_of_its_blocks(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.begin({})
    stage.finish()
    Blocks(tmp_path / rundir.BLOCKS, n=1, size=1).done(range(1), {})
    assert not stage.begin({})
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_what_safetensors_left_of_a_killed_write_is_swept(tmp_path: Path) -> None:
    """It writes to `.tmp` and six letters, then renames."""
    stage, run = Stage(tmp_path / "erase"), RunDir(tmp_path)
    stage.begin({})
    for name in ("erase/checkpoints/.tmpQdMCgF", ".run.json.99.tmp"):
        rundir.write_bytes(tmp_path / name, b"half")
    with run.locked():
        stage.begin({})
    assert {path.name for path in tmp_path.rglob("*")} == {".lock", "erase", "checkpoints", "partial.json"}


def test_who_holds_a_folder_keeps_it_through_what_asks_for_it_again(tmp_path: Path) -> None:
    asking = (
        "import sys; from pathlib import Path; from duo.rundir import RunDir\n"
        "try:\n    RunDir(Path(sys.argv[1])).locked().__enter__()\nexcept Exception as error:\n    print(error)"
    )

    def refused() -> str:
        done = subprocess.run([sys.executable, "-c", asking, str(tmp_path)], capture_output=True, text=True, check=True)
        return done.stdout

    with RunDir(tmp_path).locked():
        with RunDir(tmp_path).locked():
            pass
        assert f"is in use by process {os.getpid()} on " in refused() and ", started 20" in refused()
        other = threading.Thread(target=lambda: told.append(_locked(tmp_path)))
        told: list[str] = []
        other.start()
        other.join()
        assert "is in use by process" in told[0], "another thread is another user"
    assert refused() == ""


def _locked(folder: Path) -> str:
    try:
        with RunDir(folder).locked():
            return ""
    except UserError as error:
        return str(error)
