"""What was cut off, changed or swapped in a run folder is found by its digest, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from duo import checkpoint, rundir
from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.rundir import RunDir, Stage
from duo.stages import attack, erase, report, score
from staged import all_stages


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change the last byte but eight: of tensors a number, of JSON a word."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def repaint(path: Path) -> None:
    """Another picture, that can be read."""
    with Image.open(path) as image:
        Image.new("RGB", image.size, (1, 2, 3)).save(path)


# --- files of tensors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut, flip])
def test_tensors_that_are_not_those_that_were_written_are_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.safetensors"
    written = {"b": torch.arange(6, dtype=torch.bfloat16), "a": torch.tensor(3), "none": torch.zeros(0, 2)}
    write_tensors(path, written, {"step": 3})
    tensors, record = read_tensors(path)
    assert record == {"step": 3} and tensors.keys() == written.keys()
    damage(path)
    with pytest.raises(UserError, match=rf"^{path} (is damaged|cannot be read).*; restore it$"):
        read_tensors(path, todo="restore it")


def test_tensors_of_older_versions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs have no digest."""
    save = checkpoint.save_file

    def without(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, {"duo": '{"step":3}'})

    monkeypatch.setattr(checkpoint, "save_file", without)
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(4)}, {})
    flip(tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")[1] == {"step": 3}


def test_a_disk_that_is_full_is_told_as_such_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own, as it tells of a tmpfs that is too small."""

    def full(_tensors: Any, path: Path, _metadata: Any) -> None:
        path.write_bytes(b"half")
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"Errno 28.*No space left on device: '.*a\.safetensors'"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    assert not list(tmp_path.iterdir())

    def broken(*_: Any) -> None:
        raise checkpoint.SafetensorError("no such dtype")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(checkpoint.SafetensorError, match="no such dtype"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})


# --- a whole run -----------------------------------------------------------------------------------------


def test_a_manifest_has_the_digest_of_every_file_of_its_stage(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "erase")
    stage.begin({})
    kept = ("delta.safetensors", "images/0000.png")
    passing = ("log.jsonl", "timings.jsonl", "checkpoints/checkpoint-0000001.safetensors", "blocks/0000.json")
    inner = ("round-0/run.json", "round-0/pairs/pairs.jsonl")
    for name in (*kept, *passing, *inner):
        rundir.write_bytes(stage.folder / name, b"{}\n")
    stage.finish()
    files = rundir.read_json(stage.manifest)["files"]
    assert files == dict.fromkeys(kept, "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356")
    assert stage.altered("images") is None and stage.sealed("delta.safetensors") == files["delta.safetensors"]
    flip_to = stage.folder / "images/0000.png"
    flip_to.write_bytes(b"[]\n")
    assert stage.altered("images") == "images/0000.png" and stage.altered("others") is None
    flip_to.unlink()
    assert stage.altered("images") is None, "what was removed is not altered"


def test_damage_to_a_run_is_told_by_the_name_of_the_file(open_session: Any, tmp_path: Path) -> None:
    all_stages(open_session("whole"))

    def read_report(session: Any) -> None:
        report(session.dir.path)

    bell, inversion = "attack/bell/original", "attack/inversion/erased"
    for path, damage, unfinished, act, told in (
        ("pairs/unsafe/0001.png", cut, (), erase_anew, "pairs/unsafe/0001.png"),
        ("pairs/unsafe/0001.png", repaint, (), erase_anew, r"images were changed \(unsafe/0001.png\)"),
        ("pairs/manifest.json", cut, (), erase_anew, "pairs/manifest.json is not valid JSON"),
        ("erase/delta.safetensors", flip, (), attack, "erase/delta.safetensors is not what"),
        ("attack/images/0001.png", repaint, (), attack, r"attack/images holds other images .*\(0001.png\)"),
        ("attack/images/images.jsonl", flip, (), attack, "attack/images/images.jsonl is not what"),
        (f"{bell}/state.safetensors", flip, (), retake_bell, f"{bell}/state.safetensors is not what"),
        (f"{inversion}/state.safetensors", flip, (inversion,), attack, f"{inversion}/state.safetensors is damaged"),
        (f"{inversion}/search/0001.safetensors", flip, (inversion,), attack, "search/0001.safetensors is damaged"),
        (f"{inversion}/images/0001.png", repaint, ("score",), score, r"holds other images .*\(0001.png\)"),
        (f"{inversion}/attempts.jsonl", flip, ("score",), score, f"{inversion}/attempts.jsonl is not what"),
        ("score/images/unrelated/erased/0000.png", repaint, (), read_report, "unrelated/erased/0000.png is not what"),
        ("score/verdicts.jsonl", flip, (), read_report, "score/verdicts.jsonl is not what"),
        ("score/scores.json", flip, (), read_report, "score/scores.json is not what"),
        ("run.json", cut, (), attack, "run.json is not valid JSON"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        for name in unfinished:
            stage = RunDir(tmp_path / "run").stage(*name.split("/"))
            rundir.write_json(stage.partial, {"schema": 1, "config": rundir.read_json(stage.manifest)["config"]})
            stage.manifest.unlink()
        damage(tmp_path / "run" / path)
        with pytest.raises(UserError, match=told) as caught:
            act(open_session("run"))
        assert "\n" not in str(caught.value), path


def erase_anew(session: Any) -> None:
    shutil.rmtree(session.dir.path / "erase")
    erase(session)


def retake_bell(session: Any) -> None:
    """The erased model takes over what the attack learned of the original one."""
    shutil.rmtree(session.dir.path / "attack" / "bell" / "erased")
    attack(session)
