"""Files that somebody else may have written: which are read at all, and JSON that cannot harm its reader. No torch.

A run folder, a results folder or a model may come as an archive, which can hold pipes, links to anywhere and files of
any size; and JSON can hold numbers and depths that the code behind it would fail on.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from duo.errors import UserError

DEEPEST = 100  # tables and lists within each other
TOO_DEEP = f"it is nested more than {DEEPEST} deep"
LARGEST = 2**30  # bytes of a text file; the verdicts of a million images are a third of that
MOST_DIGITS = 100  # of a whole number; floats end at 1e308, and seeds at 2⁶⁴


def read_whole(path: Path) -> bytes:
    """The bytes of a file. Raises what `Path.read_bytes` raises, and `ValueError` for what is no plain file, such as a
    pipe, which would never end, and for one that is too large to be read at once."""
    with open_plain(path) as file:
        return file.read()


def open_plain(path: Path) -> BinaryIO:
    """The same file, to be read bit by bit: one line may be all of it, so it may be no larger."""
    file = open(path, "rb", opener=_unblocked)  # noqa: SIM115
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_size <= LARGEST:
        return file
    file.close()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no plain file")
    raise ValueError(f"it has {about.st_size:,} bytes, more than {LARGEST:,}")


def read_text(path: Path, *, encoding: str = "utf-8") -> str:
    """As `read_whole`, of a text; `ValueError` where it is not in that encoding. Line ends are as Python reads them."""
    return read_whole(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def json_value(text: str | bytes, *, table: Callable[[dict[str, Any]], Any] | None = None, finite: bool = True) -> Any:
    """The value of a JSON text; `ValueError` where it is none, is nested too deep or has a number that is not finite.

    `table` makes what stands for each object of its dict. Not `finite`: NaN and infinity, as Python writes them, are
    left to a reader that looks at every number, and so can name its field.
    """
    try:
        value = json.loads(
            text,
            object_hook=table,
            parse_constant=_not_finite if finite else float,
            parse_float=_finite,
            parse_int=_whole_number,
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    refuse_deep(value)
    return value


def refuse_deep(value: Any) -> None:
    """Raise `ValueError` where tables and lists are nested deeper than code that follows them down could go."""
    level, depth = [value], 0
    while level := [
        item
        for one in level
        if isinstance(one, dict | list)
        for item in (one.values() if isinstance(one, dict) else one)
        if isinstance(item, dict | list)
    ]:
        depth += 1
        if depth >= DEEPEST:
            raise ValueError(TOO_DEEP)


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a file or folder and leads nowhere else."""
    return Path(name).name == name and name not in ("", "..") and name.isprintable()


def refuse_strays(folder: Path) -> None:
    """Raise `UserError` where a folder holds a link that leads out of it, or what is neither a file nor a folder.

    What is written to such a folder would be written elsewhere, and what is read might never end.
    """
    whole = folder.resolve()
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                if not _leads_into(whole, path):
                    raise UserError(
                        f"{path} is a link out of {folder}; remove it, or put what it leads to in its place"
                    )
            elif name in files and not path.is_file():
                raise UserError(f"{path} is a pipe or a device, which no run has; remove it")


def _leads_into(whole: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(whole)
    except (OSError, RuntimeError):  # it leads to itself
        return False


def _unblocked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # to open a pipe would wait for somebody to write to it


def _not_finite(text: str) -> Any:
    raise ValueError(f"it holds {text}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}, which is too large")
    return value


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it holds a whole number of {len(text)} digits")
    return int(text)
