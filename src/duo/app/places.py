"""What the page is about: the folders of runs, and folders of pairs that belong to no run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duo import rundir
from duo.errors import UserError
from duo.foreign import refuse_strays
from duo.pairs import SIDES
from duo.rundir import RunDir

RUNS = Path("runs")  # where to look when no folder is named


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that the page was given. `run` is None where it holds pairs alone, `pairs` where the run has none."""

    name: str
    run: RunDir | None
    pairs: Path | None

    @classmethod
    def at(cls, path: Path) -> Place:
        """The run at `path`, or the pairs there; the folder `pairs` of a run stands for that run."""
        if _is_run(path.resolve().parent) and path.resolve().name == "pairs":
            path = path.parent if path.name == "pairs" else path.resolve().parent
        if path.is_dir():
            refuse_strays(path)
        if _is_run(path):
            made = path / "pairs"
            for record in (path / rundir.RUN, made / rundir.MANIFEST):
                if record.is_file():
                    rundir.read_json(record)  # one of a later version of duo is not to be written to
            return cls(name=str(path), run=RunDir(path), pairs=made if made.is_dir() else None)
        if all((path / side).is_dir() for side in SIDES):
            return cls(name=str(path), run=None, pairs=path)
        what = "is neither a run nor a folder with unsafe/ and safe/" if path.is_dir() else "is no folder"
        raise UserError(f"{path} {what}; give the --out of a `duo run`, or a folder of pairs")


def find_places(paths: Sequence[Path]) -> list[Place]:
    """The places at `paths`; where none is named, the runs in the folder `runs` of the working folder."""
    if paths:
        return [Place.at(path) for path in dict.fromkeys(paths)]
    found = sorted(path for path in RUNS.iterdir() if _is_run(path)) if RUNS.is_dir() else []
    if not found:
        raise UserError(f"no run is named, and there is none in {RUNS}/; give the --out of a `duo run`")
    return [Place.at(path) for path in found]


def within(folder: Path, *paths: Path) -> None:
    """Raise `UserError` for the first of the paths that leads out of the folder, as a link may."""
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path} leads out of {folder}, so it is not shown; put the file itself there")


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()
