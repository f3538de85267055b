"""Names and links that lead out of a folder: nothing is written there, and what was meant to stay inside is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_cells
import ordeal
import pytest
import sealed

from duo.app.places import Place
from duo.erasures import Erasure
from duo.errors import UserError
from duo.report import write_report
from duo.report.card import write_card
from duo.report.evidence import gather
from duo.report.tradeoff.cells import read_results
from duo.rundir import RunDir, read_json, read_jsonl


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's, in which nothing may change."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "keys").write_text("secret\n")
    (folder / "0000.png").write_text("secret\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return sealed.write_run(tmp_path / "run", attacks={"prompts": (1, 0, 0)})


def work(run: Path) -> None:
    with RunDir(run).locked(), RunDir(run).timed("score"):
        pass


VERBS: dict[str, Callable[[Path], object]] = {
    "report": lambda run: (RunDir(run).require(), write_report(run)),
    "card": write_card,
    "gate": gather,
    "merge": Erasure.read,
    "work": work,
    "page": Place.at,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "name", [".lock", "timings.jsonl", "score/scores.json", "pairs/unsafe/0000.png", "attack", "new", "erase/new"]
)
def test_a_link_out_of_a_run_is_refused(run: Path, outside: Path, verb: str, name: str) -> None:
    path = run / name
    if path.is_dir():
        path.rename(run.with_name("moved"))
    path.unlink(missing_ok=True)
    path.symlink_to(outside if path.suffix == "" and name != ".lock" else outside / "keys")
    refusal = ordeal.endure("run", lambda: VERBS[verb](run), writes=run)
    assert refusal is not None and "is a link out of" in str(refusal) and str(path) in str(refusal)
    assert sorted(one.name for one in outside.iterdir()) == ["0000.png", "keys"]
    assert all(one.read_text() == "secret\n" for one in outside.iterdir())


def test_links_within_a_run_and_to_a_run_are_followed(run: Path, tmp_path: Path) -> None:
    (run / "again.json").symlink_to("run.json")
    link = tmp_path / "link"
    link.symlink_to(run)
    for one in (run, link):
        ordeal.accepted("run", lambda: write_report(one), writes=tmp_path)  # noqa: B023
        ordeal.accepted("run", lambda: work(one), writes=tmp_path)  # noqa: B023


@pytest.mark.parametrize("kind", ["pipe", "loop"])
def test_what_is_no_file_in_a_run_is_refused(run: Path, kind: str) -> None:
    path = run / "score" / "more.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    for verb in VERBS.values():
        assert str(path) in str(ordeal.endure("run", lambda: verb(run), writes=run))  # noqa: B023


@pytest.mark.parametrize("read", [read_json, read_jsonl])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_record_that_never_ends_is_refused(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "x.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert ordeal.endure("rows", lambda: read(path), writes=tmp_path)


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_an_enormous_record_is_refused(tmp_path: Path, size: int) -> None:
    for name, read in (("x.json", read_json), ("x.jsonl", read_jsonl)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # which takes no place on the disk
        assert ordeal.endure("rows", lambda: read(tmp_path / name), writes=tmp_path)  # noqa: B023


NAMES = ("../../outside/0000.png", "/etc/passwd", "../../../../etc/passwd", "a/../../../outside/0000.png", "x\0", "")


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("side", ["unsafe", "safe"])
def test_rows_of_pairs_lead_nowhere_else(run: Path, outside: Path, name: str, side: str) -> None:
    path = run / "pairs" / "pairs.jsonl"
    rows = [json.loads(line) | {side: name} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusal = ordeal.endure("run", lambda: write_report(run), writes=run)
    assert refusal is not None and "which is outside" in str(refusal)


@pytest.mark.parametrize("field", ["row", "method"])
@pytest.mark.parametrize("name", [*NAMES, ".", "..", "a/b", "\x1b[2J"])
def test_the_cells_of_a_bench_lie_in_its_folder(tmp_path: Path, outside: Path, name: str, field: str) -> None:
    results = tmp_path / "results"
    rows, methods = ["prompts"], {"duo": ("method.beta", [1])}
    if field == "row":
        rows = [name]
    else:
        methods = {name: ("method.beta", [1])}
    bench_cells.bench(results, rows=rows, methods=methods)
    refusal = ordeal.endure("bench cells", lambda: read_results(results), writes=results)
    assert refusal is not None and "plain name" in str(refusal)


@pytest.mark.parametrize("path", [5, None, ["x"], {"a": 1}])
def test_an_artefact_without_a_path_is_told(run: Path, path: Any) -> None:
    sealed.edit(run / "erase" / "manifest.json", {"artefact": {"kind": "lora", "path": path}})
    with pytest.raises(UserError, match="has an artefact without a path"):
        RunDir(run).erasure()


@pytest.mark.parametrize("field", ["digest", "config"])
def test_a_field_that_a_manifest_lacks_is_told_with_its_file(run: Path, field: str) -> None:
    path = run / "erase" / "manifest.json"
    table = json.loads(path.read_text())
    del table[field]
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"erase/manifest.json has no (field|table) '{field}'"):
        RunDir(run).erasure()


def test_the_folder_of_results_is_a_name_that_leads_nowhere(run: Path, tmp_path: Path) -> None:
    from duo.report.result import write_result

    for name in ("../../outside", "/etc/x", "..", "\0", "a" * 100):
        sealed.rescore(run, concept=name, method=name, model=name)
        config = json.loads((run / "erase" / "manifest.json").read_text())
        into = tmp_path / "results"
        ordeal.endure("run", lambda: write_result(run, into), writes=into)  # noqa: B023
        assert config
    assert not (tmp_path / "outside").exists() and {one.name for one in tmp_path.iterdir()} <= {"run", "results"}
