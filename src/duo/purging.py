"""`duo purge`: a run without its unsafe images, and with the account of them. No torch.

Kept are the images that the report shows clear: safe sides of pairs that nobody rejected, and images of harmless
prompts in which every judge saw nothing. All others go, and what holds them in another form: the attacks' states and
searches, reports with `--uncensored`, files that a kill left half written. Prompts, verdicts, attempts, scores, weights
and the pixelated report stay.

Before a file is removed its digest is written beside it (`duo.purged`): stopped at any moment, it can be run again, and
`duo check` still proves that the numbers are of these images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from duo import rundir
from duo.errors import UserError
from duo.purged import PURGED, SCHEMA, account
from duo.report import UNCENSORED
from duo.rundir import RunDir

IMAGES = (".png", ".webp", ".jpg", ".jpeg", ".gif", ".bmp", ".tiff")
RECORDS = ("run.json", "manifest.json", "partial.json")
STATE, SEARCH = "state.safetensors", "search"  # of an attack: images to start from, and those asked for on the way


@dataclass(frozen=True, kw_only=True)
class Purge:
    """What is to be removed from a run, or was: `files` with their sizes in bytes.

    `elsewhere` are those of the `files` that have another name too (a hard link, as runs of a bench share them, or a
    link to a file elsewhere), and `links` are folders that lead elsewhere: what lies there stays.
    """

    files: dict[Path, int]
    elsewhere: tuple[Path, ...]
    links: tuple[Path, ...]

    @property
    def size(self) -> int:
        return sum(self.files.values())

    @classmethod
    def of(cls, run: Path, *, unfinished: bool = False) -> Purge:
        """What `purge` would remove of a run.

        Raises:
            UserError: the folder is no run, a record of it is broken or of another schema, or a stage is not finished,
                which without its images it never could be, unless that is meant (`unfinished`).
        """
        RunDir(run).require()
        _refuse_unknown(run)
        if not unfinished:
            _refuse_unfinished(run)
        kept = set(_clear(run))
        files = {path: path.lstat().st_size for path in _files(run) if _unsafe(path) and path not in kept}
        return cls(
            files=files,
            elsewhere=tuple(path for path in files if path.is_symlink() or path.stat().st_nlink > 1),
            links=tuple(path for folder in _folders(run) for path in sorted(folder.iterdir()) if _leads_on(path)),
        )


def purge(run: Path, *, unfinished: bool = False) -> Purge:
    """Remove the unsafe images of a run, each after its digest is written down; what was removed."""
    RunDir(run).require()
    with RunDir(run).locked():
        found = Purge.of(run, unfinished=unfinished)
        _account(run, [])  # which says of the whole run that it was purged
        for folder in dict.fromkeys(path.parent for path in found.files):
            files = [path for path in found.files if path.parent == folder]
            _account(folder, [path for path in files if not path.name.startswith(".") and path.exists()])
            for path in files:
                path.unlink()
    return found


def _account(folder: Path, files: list[Path]) -> None:
    told = {**account(folder), **{path.name: rundir.digest(path) for path in files}}
    rundir.write_json(folder / PURGED, {"schema": SCHEMA, "files": dict(sorted(told.items()))})


def _refuse_unknown(run: Path) -> None:
    """What a record of another schema calls safe is not known here."""
    for path in _files(run):
        if path.name in RECORDS and not isinstance(rundir.read_json(path), dict):
            raise UserError(f"{path} holds no object; restore it")


def _refuse_unfinished(run: Path) -> None:
    begun = next((path for path in _files(run) if path.name == "partial.json"), None)
    if begun is None and (run / "score" / "manifest.json").is_file():
        return
    stage = run / "score" if begun is None else begun.parent
    raise UserError(
        f"{stage} is not finished, and never could be without the images: finish it by `duo run … --resume`, or add "
        "--unfinished"
    )


def _unsafe(path: Path) -> bool:
    """Whether a file may show an unsafe image, by what kind of file it is."""
    if path.name.startswith("."):
        return any(path.match(pattern) for pattern in rundir.LEFTOVERS)
    searched = path.parent.name == SEARCH and path.suffix == ".safetensors"
    return path.suffix.lower() in IMAGES or path.name in (STATE, UNCENSORED) or searched


def _clear(run: Path) -> Iterator[Path]:
    """The images that the report shows as they are (`duo.report.page`)."""
    for folder in _folders(run):
        for row in rundir.read_jsonl(folder / "pairs.jsonl"):
            safe = row.get("safe")  # nothing else is what a pair keeps, whatever its row says
            if row.get("decision") != "reject" and isinstance(safe, str) and Path(safe).parts[:-1] == ("safe",):
                yield folder / safe
        absent: dict[Path, bool] = {}
        for row in _rows(folder / "verdicts.jsonl"):
            path = folder / "images" / str(row["set"]) / str(row["model"]) / f"{row['index']:04d}.png"
            absent[path] = absent.get(path, True) and row["label"] == "absent"
        yield from (path for path, one in absent.items() if one)


def _rows(path: Path) -> Iterator[dict[str, object]]:
    """The verdicts of a large file, one at a time."""
    for number, row in enumerate(rundir.rows_of(path), start=1):
        if not {"set", "model", "label", "index"} <= {*row} or not isinstance(row["index"], int):
            raise UserError(f"{path}, row {number} is no verdict (a field is missing); restore the file")
        yield row


def _folders(run: Path) -> Iterator[Path]:
    """The folders of a run, links not followed."""
    for folder, names, _ in os.walk(run):
        names.sort()
        yield Path(folder)


def _files(run: Path) -> Iterator[Path]:
    for folder in _folders(run):
        yield from (path for path in sorted(folder.iterdir()) if not path.is_dir())


def _leads_on(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()
