"""Two gloo processes on the CPU against one: the same bytes from every stage, the same training within round-off."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from duo import cli, parallel, plugins, rundir
from duo.checkpoint import read_tensors
from duo.errors import UserError
from duo.models import load_family
from duo.precision import sharded

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Two:
    """What two processes left, and what they said."""

    folder: Path
    codes: list[int]
    out: list[str]
    err: list[str]


@pytest.fixture(scope="module")
def two(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Two:
    from parallel_worker import write_recipes

    folder = tmp_path_factory.mktemp("two")
    write_recipes(folder, str(tiny_folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "parallel_worker.py"), str(folder), str(tiny_folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=900) for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(err for _, err in said)
    codes = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return Two(folder, [code for both in codes for code in both], [out for out, _ in said], [err for _, err in said])


@pytest.fixture(scope="module")
def one(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one process, this one."""
    from parallel_worker import leaves, train, write_recipes

    folder = tmp_path_factory.mktemp("one")
    write_recipes(folder, str(tiny_folder))
    load = plugins.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", lambda kind, name: leaves().get((kind, name)) or load(kind, name))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert cli.main(["run", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
        train(load_family(str(tiny_folder)), folder / "trained")
        torch.set_num_threads(threads)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but those that hold times, and the paths of its own folder in what does."""
    files = (path for path in folder.rglob("*") if path.is_file())
    kept = {str(path.relative_to(folder)): path for path in files if path.name not in ("timings.jsonl", ".lock")}
    timed = ("report.html", "report.json", "README.md", "run.json")  # these name the command, and so the folder
    return {name: path.read_bytes() for name, path in kept.items() if path.name not in timed}


def test_every_stage_leaves_the_same_bytes(one: Path, two: Two) -> None:
    assert two.codes == [0, 2, 0, 2]
    found, wanted = contents(two.folder / "run"), contents(one / "run")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert {
        "score/verdicts.jsonl",
        "pairs/unsafe/0002.png",
        "attack/inversion/erased/state.safetensors",
        "erase/round-1/pairs/pairs.jsonl",
        "erase/round-1/erase/delta.safetensors",
    } <= found.keys()


def test_the_main_process_alone_tells(two: Two) -> None:
    assert "report.html" in two.out[0]
    assert two.out[1].count("\n") == 1, "the worker's own line"
    assert "pairs:" not in two.err[1], "progress is shown once"


def test_an_error_in_one_process_stops_both_and_is_told_once(two: Two) -> None:
    lines = [line for err in two.err for line in err.splitlines() if "broke" in line or "stopped" in line]
    assert lines == ["duo: this judge broke"]
    assert "Traceback" not in "".join(two.err)
    blocks = list((two.folder / "broken" / "pairs" / "blocks").glob("*.json"))
    assert len(blocks) < 40, "the other process did not go on to the end"
    assert not (two.folder / "broken" / "pairs" / "manifest.json").exists()


def test_two_processes_train_as_one_does(one: Path, two: Two) -> None:
    alone, shared = (rundir.read_jsonl(folder / "trained" / "log.jsonl") for folder in (one, two.folder))
    assert len(alone) == len(shared) == 20
    for ours, theirs in zip(alone, shared, strict=True):
        assert {**ours, "margin": 0} == pytest.approx({**theirs, "margin": 0}, rel=1e-4, abs=1e-9)
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-6)  # it crosses 0
    wanted, found = (read_tensors(folder / "trained" / "delta.safetensors")[0] for folder in (one, two.folder))
    moved = torch.cat([value.flatten() for value in wanted.values()])
    assert (torch.cat([found[name].flatten() for name in wanted]) - moved).norm() < 1e-4 * moved.norm()
    assert alone[0] != alone[-1]


def test_a_sharded_denoiser_trains_the_same_lora(two: Two) -> None:
    whole, shares = (rundir.read_jsonl(two.folder / name / "log.jsonl") for name in ("trained", "sharded"))
    assert len(whole) == len(shares) == 20
    assert shares[0]["loss"] == whole[0]["loss"]  # forward passes are the same bytes, gradients are added up otherwise
    assert shares[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    wanted, found = (read_tensors(two.folder / name / "delta.safetensors")[0] for name in ("trained", "sharded"))
    moved = torch.cat([value.flatten() for value in wanted.values()])
    assert (torch.cat([found[name].flatten() for name in wanted]) - moved).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_holds_half_of_a_sharded_denoiser_and_then_all_of_it(two: Two, rank: int) -> None:
    told = rundir.read_json(two.folder / f"held-{rank}.json")
    saved = {when: told["whole"][when] - told["shares"][when] for when in ("between", "passing")}
    assert saved["between"] == pytest.approx(told["size"] / 2, rel=0.01)
    assert saved["passing"] > told["size"] / 4, "a block that was passed is let go of"
    assert told["same"], "the weights came back"


def test_sharding_goes_with_autocast_checkpointing_and_offloading(two: Two) -> None:
    (whole,), (shares,) = (rundir.read_jsonl(two.folder / f"rounded{end}" / "log.jsonl") for end in ("", "-sharded"))
    assert shares["loss"] == whole["loss"]
    assert shares["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-2)  # sums of bfloat16, in another order


# --- alone ------------------------------------------------------------------------------------------


def test_a_single_process_needs_nobody() -> None:
    assert (parallel.size(), parallel.rank(), parallel.is_main()) == (1, 0, True)
    assert list(parallel.mine([3, 1, 2])) == [3, 1, 2]
    assert parallel.once(lambda: [1, None]) == [1, None]
    assert parallel.start("cuda") == "cuda"
    assert parallel.stop()
    parallel.barrier()


@pytest.mark.parametrize(("rows", "processes"), [(4, 2), (5, 2), (7, 3), (3, 3)])
def test_shares_cover_a_batch_once(rows: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    covered: list[Any] = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        covered += range(rows)[parallel.share(rows)]
    assert covered == list(range(rows))
    with pytest.raises(UserError, match=f"train_batch_size = 1 for {processes} processes; give each at least one pair"):
        parallel.share(1)


def test_the_second_process_leaves_what_cannot_be_shared_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["list", "methods"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["list", "methods"]) == 0
    assert "duo" in capsys.readouterr().out


def test_sharding_changes_nothing_for_one_process(tiny_sd: Any) -> None:
    before = tiny_sd.denoiser
    weights = [parameter.data_ptr() for parameter in before.parameters()]
    with sharded(tiny_sd, shard=True):
        assert tiny_sd.denoiser is before
        assert [parameter.data_ptr() for parameter in before.parameters()] == weights


def test_a_denoiser_whose_blocks_are_not_known_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model: Any = SimpleNamespace(denoiser=torch.nn.Linear(2, 2), device=torch.device("cpu"))
    with (
        pytest.raises(UserError, match="a Linear does not tell its blocks; set it to false"),
        sharded(model, shard=True),
    ):
        pass
    assert model.denoiser.weight.shape == (2, 2)


def test_a_connection_that_breaks_is_news_only_where_nobody_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    store = SimpleNamespace(check=lambda keys: keys == [parallel.STOPPED])
    monkeypatch.setattr(parallel, "_meeting", lambda: parallel._Meeting(store))
    with pytest.raises(parallel.StoppedError, match="another process stopped"), parallel.exchanging():
        raise RuntimeError("connection closed by peer")
    store.check = lambda keys: False
    with pytest.raises(RuntimeError, match="closed by peer"), parallel.exchanging():
        raise RuntimeError("connection closed by peer")
