"""JSON read field by field: whatever is missing or of the wrong kind is a `UserError` that names file and field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from duo import rundir
from duo.errors import UserError
from duo.foreign import is_plain_name, json_value

RESTORE = f"restore the file, or {rundir.ANEW}"  # what to do with a record of a run that is wrong
HUGE = 1e100  # no number of a record is so large; floats end at 1e308, and whole numbers of JSON nowhere


class Fields:
    """One JSON object of the file (or part of a file) that `where` names; `todo` ends every message."""

    def __init__(self, data: object, where: str, *, todo: str = RESTORE) -> None:
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: expected an object, found {type(data).__name__}; {todo}")
        self.data: Mapping[str, Any] = data
        self.where = where
        self.todo = todo

    def error(self, fault: str) -> UserError:
        """What is wrong here, as an error that says what to do."""
        return UserError(f"{self.where}: {fault}; {self.todo}")

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def text(self, key: str) -> str:
        value = self._get(key)
        return value if isinstance(value, str) else self._wrong(key, "a text")

    def text_or_none(self, key: str) -> str | None:
        return None if self._get(key) is None else self.text(key)

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._wrong(key, "a list of texts")
        return list(value)

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        return value if value in allowed else self._wrong(key, " or ".join(map(repr, allowed)))

    def folder_name(self, key: str) -> str:
        """The plain name of a folder, which leads nowhere else."""
        name = self.text(key)
        return name if is_plain_name(name) else self._wrong(key, "the plain name of a folder")

    def inside(self, folder: Path, key: str) -> Path:
        """A file that a record names, refused where the name leads out of `folder`, the stage's own."""
        path = folder / self.text(key)
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except (ValueError, RuntimeError):  # a NUL in it, or links that lead to each other
            inside = False
        if not inside:
            raise UserError(f"{self.where}: field {key!r} is {self.data[key]!r}, which is outside {folder}")
        return path

    def below(self, folder: PurePath, key: str) -> PurePath:
        """The name of a file below `folder`, by the name alone: for links, and faster than `inside`, which looks."""
        path = PurePath(self.text(key))
        if path.is_absolute() or ".." in path.parts:
            self._wrong(key, f"a file in {folder}")
        return folder / path

    def flag(self, key: str) -> bool:
        value = self._get(key)
        return value if isinstance(value, bool) else self._wrong(key, "true or false")

    def whole(self, key: str, *, least: int = 0) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._wrong(key, f"a whole number from {least} up")
        return int(value)

    def number(self, key: str, *, most: float = HUGE) -> float:
        """A finite number; with `most`, none above that."""
        value = self._get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < HUGE or value > most:
            self._wrong(key, "a finite number" if most == HUGE else f"a number up to {most:g}")
        return float(value)

    def share(self, key: str) -> float:
        """A number from 0 to 1."""
        value = self.number(key)
        return value if 0 <= value <= 1 else self._wrong(key, "a number from 0 to 1")

    def table(self, key: str) -> Fields:
        value = self._get(key)
        if not isinstance(value, Mapping):
            self._wrong(key, "an object")
        return Fields(value, f"{self.where}: {key}", todo=self.todo)

    def table_or_none(self, key: str) -> Fields | None:
        return None if self._get(key) is None else self.table(key)

    def tables(self, key: str) -> list[Fields]:
        """A list of objects, each named by its position."""
        value = self._get(key)
        if not isinstance(value, list):
            self._wrong(key, "a list")
        return [Fields(item, f"{self.where}: {key}[{index}]", todo=self.todo) for index, item in enumerate(value)]

    def _get(self, key: str) -> Any:
        if key not in self.data:
            raise self.error(f"field {key!r} is missing")
        return self.data[key]

    def _wrong(self, key: str, expected: str) -> Any:
        found = repr(self.data[key])
        found = found if len(found) <= 60 else found[:57] + "..."
        raise self.error(f"field {key!r} is {found}, expected {expected}")


def read_object(path: Path, *, todo: str = RESTORE, finite: bool = True) -> Fields:
    """The object in one JSON file, of a run unless `todo` says what to do with a broken one of another kind."""
    return Fields(rundir.read_json(path, todo=todo, finite=finite), str(path), todo=todo)


def read_rows(path: Path, *, appended: bool = False) -> Iterator[Fields]:
    """The objects of a JSON-lines file of a run, which must be there, one at a time.

    `appended` as in `rundir.read_jsonl`, which reads all at once.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; put it back, or {rundir.ANEW}")
    with path.open("rb") as file:  # line by line, for verdicts may be many
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            if appended and not whole:
                return  # a kill cut it off
            try:
                row = json_value(line)
            except ValueError as error:
                fault = f"row {number}: {error}" if whole else "its last line is cut off"
                raise UserError(
                    f"{path} is not valid JSONL ({fault}); restore it, or start anew with another --out"
                ) from error
            yield Fields(row, f"{path}, row {number}")
