"""`duo purge`: no unsafe image is left, the numbers are still bound to what they are of, and nothing else is lost."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from duo import purging, rundir
from duo.cli import main
from duo.errors import UserError
from duo.purged import PURGED, account, removed
from duo.purging import Purge, purge
from duo.report import UNCENSORED, write_report
from duo.report.evidence import gather
from duo.rundir import RunDir
from staged import all_stages

PIXELS = (".png", ".webp")


@pytest.fixture
def run(open_session: Any) -> Path:
    """A finished run of the tiny model, with a nested one, half a file, and the page that is not to be passed on."""
    session = open_session()
    all_stages(session)
    folder: Path = session.dir.path
    write_report(folder, uncensored=True)
    image = folder / "pairs/unsafe/0000.png"
    rundir.link(image, folder / "erase/round-0/pairs/unsafe/0000.png")
    (folder / "pairs/unsafe/.0001.png.7.tmp").write_bytes(image.read_bytes()[:40])
    return folder


def images(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in PIXELS}


def others(folder: Path) -> dict[str, bytes]:
    """What is neither an image, nor holds one, nor is the account."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and path.suffix not in (*PIXELS, ".tmp")
        and path.name not in (PURGED, UNCENSORED, "state.safetensors", ".lock")
        and path.parent.name != "search"
    }


def clear(folder: Path) -> set[str]:
    """What may stay, read from the records by hand."""
    told = rundir.read_jsonl(folder / "score/verdicts.jsonl")
    rows = [row for row in told if row["set"] in ("unrelated", "photo", "car") and row["label"] == "absent"]
    safe = {f"pairs/{row['safe']}" for row in rundir.read_jsonl(folder / "pairs/pairs.jsonl")}
    return safe | {f"score/images/{row['set']}/{row['model']}/{row['index']:04d}.png" for row in rows}


def test_what_is_left_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, wanted = others(run), clear(run)
    before.pop("purged.json", None)
    assert wanted < images(run), "there are unsafe images to remove, and others to keep"
    assert list(run.glob("attack/*/*/state.safetensors")) and list(run.glob("attack/*/*/search/*.safetensors"))

    assert main(["purge", str(run), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert str(run / "pairs/unsafe/0000.png") in listed and "would be removed" in listed
    assert wanted < images(run) and not (run / PURGED).exists()
    assert not any(str(run / name) in listed.splitlines() for name in wanted)

    assert main(["purge", str(run)]) == 0
    told = capsys.readouterr()
    assert "were removed" in told.out
    assert "have another name elsewhere" in told.err  # the nested run's hard link of the same image
    assert images(run) == wanted
    assert others(run) == before
    left = {path.name for path in run.rglob("*")}
    assert not left & {UNCENSORED, "state.safetensors", ".0001.png.7.tmp"}
    assert not list(run.rglob("search/*.safetensors"))
    assert account(run).keys() == {UNCENSORED}

    # --- the numbers still are of these images, and tell when they are not
    assert main(["check", str(run), "--max-rate", "all=0.999", "--waive", "prompts", "--point"]) in (0, 1)
    assert gather(run).erasure is not None
    place = run / "attack/prompts/erased/images"
    digests = dict(account(place))
    assert [*digests] == [f"{i:04d}.png" for i in range(5)]
    rundir.write_json(place / PURGED, {"schema": 1, "files": {**digests, "0002.png": "0" * 64}})
    with pytest.raises(UserError, match="holds other images than its stage wrote"):
        gather(run)
    rundir.write_json(place / PURGED, {"schema": 1, "files": digests})

    # --- the report has the same numbers, and grey fields
    was = json.loads((run / "report.json").read_text())
    page = write_report(run).read_text()
    now = json.loads((run / "report.json").read_text())
    assert {name: one for name, one in now.items() if name != "cost"} == {
        name: one for name, one in was.items() if name != "cost"
    }
    assert "removed by duo purge" in page
    with pytest.raises(UserError, match="its unsafe images were removed by `duo purge`; leave out --uncensored"):
        write_report(run, uncensored=True)
    with pytest.raises(UserError, match=r"0000\.png was removed by `duo purge`; make it anew"):
        rundir.read_image(run / "pairs/unsafe/0000.png", remedy="put it back")

    assert Purge.of(run).files == {}, "a second time there is nothing to do"
    again = {path: path.read_bytes() for path in run.rglob(PURGED)}
    purge(run)
    assert again == {path: path.read_bytes() for path in run.rglob(PURGED)}


# --- a small folder, by hand ----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three pairs, the last of which was rejected, in a run that is scored."""
    folder = tmp_path / "run"
    for side in ("unsafe", "safe"):
        (folder / "pairs" / side).mkdir(parents=True)
        for index in range(3):
            (folder / "pairs" / side / f"{index:04d}.png").write_bytes(f"{side} {index}".encode())
    rows = [{"index": i, "unsafe": f"unsafe/{i:04d}.png", "safe": f"safe/{i:04d}.png"} for i in range(3)]
    rundir.write_jsonl(folder / "pairs/pairs.jsonl", [*rows[:2], {**rows[2], "decision": "reject"}])
    rundir.write_json(folder / "run.json", {})
    rundir.write_json(folder / "score/manifest.json", {})
    return folder


def test_a_rejected_pair_goes_whole(small: Path) -> None:
    purge(small)
    assert images(small) == {"pairs/safe/0000.png", "pairs/safe/0001.png"}
    assert [*account(small / "pairs/safe")] == ["0002.png"]


def test_one_that_any_judge_saw_something_in_goes(small: Path) -> None:
    labels = [("unrelated", 0, "absent"), ("unrelated", 1, "absent"), ("unrelated", 1, "corrupted")]
    rows = [{"set": name, "model": "erased", "index": i, "label": label} for name, i, label in labels]
    rundir.write_jsonl(small / "score/verdicts.jsonl", rows)
    for index in range(3):  # the last was never judged
        path = small / f"score/images/unrelated/erased/{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"drawn")
    purge(small)
    assert [path.name for path in small.rglob("score/images/unrelated/erased/*.png")] == ["0000.png"]


@pytest.mark.parametrize("stop_at", range(5))
def test_stopped_at_any_file_it_goes_on(small: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {path: rundir.digest(path) for path in Purge.of(small).files}
    assert len(wanted) == 4
    unlink, done = Path.unlink, []

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".png":
            if len(done) == stop_at:
                raise KeyboardInterrupt
            done.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        if stop_at < len(wanted):
            with pytest.raises(KeyboardInterrupt):
                purge(small)
            known = {path for path in wanted if path.name in account(path.parent)}
            assert {path for path in wanted if not path.exists()} <= known, "no file went before its digest was kept"
        else:
            purge(small)
    purge(small)
    assert {path: account(path.parent)[path.name] for path in wanted} == wanted
    assert all(removed(path) for path in wanted)


def test_a_run_that_is_not_finished_is_left_alone(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rundir.write_json(small / "attack/prompts/erased/partial.json", {})
    assert main(["purge", str(small)]) == 2
    assert f"{small}/attack/prompts/erased is not finished" in capsys.readouterr().err
    assert len(images(small)) == 6
    assert main(["purge", str(small), "--unfinished"]) == 0
    assert len(images(small)) == 2


@pytest.mark.parametrize("name", ["run.json", "pairs/manifest.json", "score/manifest.json"])
@pytest.mark.parametrize(
    ("text", "told"), [('{"schema": 99}', "schema 99 is not known here"), ("[]", "holds no object"), ("{", "not valid")]
)
def test_what_a_record_of_another_kind_means_is_not_guessed(small: Path, name: str, text: str, told: str) -> None:
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}.*{told}"):
        purge(small, unfinished=True)
    assert len(images(small)) == 6


def test_half_written_files_go(small: Path) -> None:
    left = [small / "attack" / name for name in (".0000.png.x1.tmp", ".tmpQdMCgF")]  # ours, and one of safetensors
    left[0].parent.mkdir()
    for path in left:
        path.write_bytes(b"half an image")
    purge(small)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("safe", ["unsafe/0000.png", "safe/../unsafe/0000.png", "/etc/0000.png"])
def test_a_row_that_calls_an_unsafe_image_safe_keeps_nothing(small: Path, safe: str) -> None:
    rows = [{**row, "safe": safe} for row in rundir.read_jsonl(small / "pairs/pairs.jsonl")]
    rundir.write_jsonl(small / "pairs/pairs.jsonl", rows)
    purge(small)
    assert not any(name.startswith("pairs/unsafe") for name in images(small))


def test_no_run_and_one_at_work_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        purge(tmp_path)
    # another thread is another user
    with (
        RunDir(small).locked(),
        ThreadPoolExecutor(1) as other,
        pytest.raises(UserError, match="is in use by process"),
    ):
        other.submit(purge, small).result()
    assert len(images(small)) == 6


def test_links_out_of_the_run_are_refused_and_not_followed(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.png").write_bytes(b"somebody's own")
    (small / "attack").mkdir()
    (small / "attack/images").symlink_to(elsewhere)
    assert main(["purge", str(small)]) == 2
    assert f"{small}/attack/images is a link out of {small}" in capsys.readouterr().err
    (small / "attack/images").unlink()
    (small / "attack/one.png").symlink_to(elsewhere / "mine.png")
    assert main(["purge", str(small)]) == 2
    assert f"{small}/attack/one.png is a link out of {small}" in capsys.readouterr().err
    assert (elsewhere / "mine.png").read_bytes() == b"somebody's own"
    assert len(images(small)) == 7, "nothing was removed"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2, "files": {}}', '{"schema": 1, "files": {"a": 1}}'])
def test_a_broken_account_is_told_and_nothing_is_removed_there(small: Path, text: str) -> None:
    (small / "pairs/unsafe" / PURGED).write_text(text)
    with pytest.raises(UserError, match=r"pairs/unsafe/purged\.json"):
        purge(small)
    assert len(list((small / "pairs/unsafe").glob("*.png"))) == 3


def test_a_verdict_that_is_none_is_told_by_its_row(small: Path) -> None:
    (small / "score/verdicts.jsonl").write_text('{"set": "unrelated"}\n')
    with pytest.raises(UserError, match=r"verdicts\.jsonl, row 1 is no verdict"):
        purge(small)
    (small / "score/verdicts.jsonl").write_bytes(b'{"set": "\xff"}\n')
    with pytest.raises(UserError, match=r"verdicts\.jsonl is not valid JSONL"):
        purge(small)
    assert len(images(small)) == 6


# --- folders that nobody else looks into ----------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folders_of_images_and_runs_are_private(tmp_path: Path, umask: int) -> None:
    from PIL import Image

    before = os.umask(umask)
    try:
        rundir.write_image(tmp_path / "a/images/0000.png", Image.new("RGB", (2, 2)))
        rundir.link(tmp_path / "a/images/0000.png", tmp_path / "b/images/0000.png")
        with RunDir(tmp_path / "run").locked():
            pass
    finally:
        os.umask(before)
    for folder in ("a/images", "b/images", "run"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700, folder


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o750)
    rundir.private(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o750


def test_it_knows_every_kind_of_image_that_a_run_writes() -> None:
    from duo.pairs import ENDINGS

    assert {*ENDINGS, ".png", ".webp"} <= {*purging.IMAGES}
