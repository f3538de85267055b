"""Captions from a file: one a line, or a column of a CSV. No torch."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from duo.errors import UserError
from duo.foreign import read_text

COLUMNS = ("prompt", "caption", "text")  # of a CSV: the first of these that it has


def read_captions(path: Path) -> list[str]:
    """The captions in `path`, without the white space around them; empty lines, and rows with an empty caption, are no
    captions. Raises `UserError` where the file cannot be read, is not UTF-8, or has none."""
    try:
        text = read_text(path, encoding="utf-8-sig")  # spreadsheets begin a CSV with a byte order mark
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a path with a NUL in it
        raise UserError(f"{path} is not a text file in UTF-8 ({error}); save it as one") from error
    lines = _column(path, text) if path.suffix.lower() == ".csv" else text.splitlines()
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"{path} has no captions; write one a line, or a CSV with a column {' or '.join(COLUMNS)}")
    return captions


def _column(path: Path, text: str) -> list[str]:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        name = next((column for column in COLUMNS if column in (rows.fieldnames or ())), None)
        if name is None:
            raise UserError(f"{path} has no column {' or '.join(COLUMNS)}; name the column of the captions so")
        return [row[name] or "" for row in rows]
    except csv.Error as error:
        raise UserError(f"{path} is not valid CSV: {error}") from error
