"""Prompt sets of other people's benchmarks: CSV files on this machine or on the hub, under their own column names.

Known are I2P (the repositories' copies and the hub's), Ring-A-Bell, P4D, UnlearnDiffAtk, MMA-Diffusion, HUB, and the
captions of COCO that papers share. None is shipped. `docs/attacks/prompt-sets.md` lists them with what is odd about
each. Whether a prompt may be rendered at all (`duo.refusal`) is for the caller to ask. No torch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from duo.errors import UserError
from duo.foreign import read_whole
from duo.sources import hub_file, hub_files, hub_path

LONGEST = 10_000  # characters; the longest prompt of the known sets has 1093
LINES = ".txt"  # files of this ending have a prompt a line, and no header
# What the known files call each column, in the order to be looked for.
PROMPTS = ("prompt", "adv_prompt", "caption")
SEEDS = ("evaluation_seed", "sd_seed")
GUIDANCES = ("evaluation_guidance", "sd_guidance_scale")
WIDTH, HEIGHT = "sd_image_width", "sd_image_height"  # `width` and `height` of COCO files are those of the photograph
KEYS = ("coco_id", "image_id", "case_number")
WITH, WITHOUT = "sensitive prompt", "normal prompt"  # RECE's and SAFREE's pairs
ASSEMBLED = ("nudity", "people", "location")  # Ring-A-Bell's half of its pairs on nudity; the other is another file

_N = TypeVar("_N", int, float)
_SHOWN = 24  # characters of a column's name in messages: a file without a header has prompts there
_OPERATOR = re.compile(r">=|<=|!=|==?|>|<|\bhas\b")
_COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts come from, and which of them.

    `path` is a file, or `hub:owner/name` or `hub:owner/name/file.csv` for a data set of the hub. `column` and
    `seed_column` are needed only where the file's own are not known here. With `lines` every line is a prompt, quotes
    and commas included, and there is no header, as in HUB's files. `filters` must all hold:

        "nudity_percentage > 50"      numbers: > >= < <= = !=
        "categories has sexual"       one of the values between commas, without the spaces around them
        "sd_model = some name"        the whole text: = !=

    `limit` keeps the first rows of those that are left.
    """

    path: str
    column: str | None = None
    seed_column: str | None = None
    lines: bool = False
    filters: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}, set it to 1 or more, or leave it out")
        if self.lines and (self.column or self.seed_column or self.filters):
            raise ValueError("lines says that there are no columns; leave out column, seed_column and filters")
        for text in self.filters:
            _Filter.read(text)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt as its file has it, spaces included, with the settings that the file has for it.

    `line` is where its row ends in the file, from 1; `key` names the image or the case, as text. `size` is (width,
    height) in pixels.
    """

    prompt: str
    line: int
    key: str | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """The rows that a source gives, in the file's order.

    `digest` is the file's sha256, `total` how many rows it has, and `empty` how many that the filters would keep have
    no prompt: they are left out (I2P had one before its authors mended it).
    """

    rows: tuple[PromptRow, ...]
    digest: str
    total: int
    empty: int


def read_prompts(source: PromptSource) -> PromptFile:
    """The prompts of a source; a `UserError` of one line where the file is none of prompts, or is damaged.

    Pairs for a concept vector are refused: papers that took them for Ring-A-Bell's adversarial prompts measured
    something else.
    """
    table = _Table.read(source.path, lines=source.lines)
    if not table.columns:
        rows = [PromptRow(prompt=text, line=line) for line, (text,) in table.rows]
        kept = [row for row in rows if row.prompt.strip()]
        empty = len(rows) - len(kept)
    else:
        column = _prompt_column(table, source)
        read = _reader(table, column, source)
        filters = [_Filter.read(text).on(table) for text in source.filters]
        passed = [(line, cells) for line, cells in table.rows if all(keep(line, cells) for keep in filters)]
        kept = [read(line, cells) for line, cells in passed if cells[column].strip()]
        empty = len(passed) - len(kept)
    if not kept:
        among = f"none of its {len(table.rows)} rows passes {', '.join(source.filters)}"
        raise UserError(f"{table.name} gives no prompt: {among if source.filters else 'all are empty'}")
    for row in kept:
        _check_length(table, row.line, row.prompt)
    return PromptFile(rows=tuple(kept[: source.limit]), digest=table.digest, total=len(table.rows), empty=empty)


def read_pairs(path: str, neutral: str | None = None) -> tuple[tuple[str, str], ...]:
    """Pairs for a concept vector, each (with the concept, without it), from the files that papers share.

    Read are RECE's and SAFREE's `sensitive prompt` and `normal prompt`, Ring-A-Bell's `prompt` and `prompt1`
    (violence), and its two files on nudity: one of parts that make a prompt, and `neutral`, whose prompts belong to the
    same cases. Images by which the authors left some of those out are not made here.
    """
    table = _Table.read(path)
    if _has(table, *ASSEMBLED):
        if neutral is None:
            raise UserError(
                f"{table.name} holds parts of prompts with the concept; give the file of those without it as neutral"
            )
        return _joined(table, _Table.read(neutral))
    if neutral is not None:
        raise UserError(f"neutral = {neutral!r} goes with a file of the columns {', '.join(ASSEMBLED)}; leave it out")
    columns = next((pair for pair in ((WITH, WITHOUT), ("prompt", "prompt1")) if _has(table, *pair)), None)
    if columns is None:
        raise UserError(
            f"{table.name} holds no pairs: its columns are {_shown(table)}; known are {WITH!r} with {WITHOUT!r}, "
            f"'prompt' with 'prompt1', and {', '.join(ASSEMBLED)}"
        )
    first, second = (table.columns.index(column) for column in columns)
    return _pairs(table, [(line, cells[first], cells[second]) for line, cells in table.rows])


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A file's rows as text, each with the number of its last line. Without `columns` a row is a line."""

    name: str  # as the user gave it
    columns: tuple[str, ...]
    rows: list[tuple[int, list[str]]]
    digest: str

    @classmethod
    def read(cls, path: str, *, lines: bool = False) -> _Table:
        file = _located(path)
        try:
            data = read_whole(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        text, digest = _decoded(path, data), hashlib.sha256(data).hexdigest()
        if lines or file.suffix == LINES:
            every = re.split(r"\r\n|\n|\r", text)  # str.splitlines would also cut at U+2028 and the like
            if not every[-1]:
                every.pop()
            return cls(name=path, columns=(), rows=[(n, [line]) for n, line in enumerate(every, 1)], digest=digest)
        header, *rows = _cells(path, text)
        columns = tuple(name.strip() for name in header[1])
        twice = [name for name, count in Counter(columns).items() if name and count > 1]
        if twice:
            raise UserError(f"{path} has two columns {twice[0]!r}; rename one")
        if not rows:
            raise UserError(f"{path} has a header and no rows")
        for line, cells in rows:
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} cells under {len(columns)} columns; a prompt with commas or "
                    'line ends must stand in quotes, and a quote in it as "" (or give lines = true where every line '
                    "is a prompt)"
                )
        return cls(name=path, columns=columns, rows=rows, digest=digest)


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """`column`, one of the operators and `value`: a number where both sides are numbers, else text."""

    text: str
    column: str
    operator: str
    value: str

    @classmethod
    def read(cls, text: str) -> _Filter:
        """`ValueError` where `text` is no filter."""
        plain = text.strip()
        found = _OPERATOR.search(plain, 1)  # the column has one character or more
        value = "" if found is None else plain[found.end() :].lstrip()
        if found is None or not value:
            raise ValueError(f"filter {text!r} is none; expected such as 'nudity_percentage > 50'")
        one = cls(text=text, column=plain[: found.start()].rstrip(), operator=found[0], value=value)
        if one.operator[0] in "<>" and _number(one.value) is None:
            raise ValueError(f"filter {text!r} compares with {one.value!r}, expected a number")
        return one

    def on(self, table: _Table) -> Callable[[int, Sequence[str]], bool]:
        """Whether a row of `table`, given with its line, passes."""
        if self.column not in table.columns:
            raise UserError(f"filter {self.text!r}: {table.name} has no such column; it has {_shown(table)}")
        place = table.columns.index(self.column)

        def keep(line: int, cells: Sequence[str]) -> bool:
            cell = cells[place].strip()
            if self.operator == "has":
                return self.value in (part.strip() for part in cell.split(","))
            mine, wanted = _number(cell), _number(self.value)
            if mine is not None and wanted is not None:
                return _COMPARED[self.operator](mine, wanted)
            if self.operator[0] in "<>":
                raise UserError(
                    f"{table.name}, line {line}: {self.column} is {cell[:_SHOWN]!r}, and filter {self.text!r} needs a "
                    "number"
                )
            return _COMPARED[self.operator](cell, self.value)

        return keep


def _located(path: str) -> Path:
    """The file itself: here, or from the hub."""
    place = hub_path(path)
    if place is None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{path} is no file; give a CSV of prompts, or hub:owner/name for a data set of the hub")
        return file
    source, name = place
    asked = {"kind": "a data set", "give": "a local file", "repo_type": "dataset"}
    if not name:
        found = hub_files(source, **asked)
        tables = [one for one in found if one.endswith((".csv", LINES)) and not one.startswith(".")]
        if len(tables) != 1:
            told = f"several files of prompts ({', '.join(tables)})" if tables else f"no CSV ({', '.join(found)})"
            todo = f"give hub:{source}/FILE" if tables else "save it as a CSV, and give that"
            raise UserError(f"{path} holds {told}; {todo}")
        (name,) = tables
    return hub_file(source, name, **asked)


def _decoded(path: str, data: bytes) -> str:
    """A file's text; a `UserError` where it is empty or no text in UTF-8."""
    if not data.strip(b"\xef\xbb\xbf \t\r\n"):
        raise UserError(f"{path} is empty")
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: there is a NUL; it is damaged, or UTF-16: save it as text in UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save it so, such as by "
            "`iconv -f latin1 -t utf-8`"
        ) from error


def _cells(path: str, text: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV that are not blank, the header among them, each with the number of its last line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for cells in reader:
            if cells:
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; mend the row, or give lines = true where every line is a prompt "
            "and there is no header"
        ) from error
    return rows


def _prompt_column(table: _Table, source: PromptSource) -> int:
    """Where the prompts stand."""
    pairs = _has(table, WITH, WITHOUT) or _has(table, *ASSEMBLED) or _has(table, "prompt", "prompt1")
    if pairs and (source.column is None or source.column == WITH):
        raise UserError(
            f"{table.name} holds pairs for a concept vector ({_shown(table)}), which are no adversarial prompts, "
            "though some code takes them for Ring-A-Bell's; they are vector_pairs of a concept "
            "(`duo.promptsets.read_pairs`)"
        )
    name = source.column or next((one for one in PROMPTS if one in table.columns), None)
    if name in table.columns:
        return table.columns.index(name)
    missing = "no known column of prompts" if name is None else f"no column {name!r}"
    raise UserError(
        f"{table.name} has {missing}: its columns are {_shown(table)}; known are {', '.join(PROMPTS)}. Give column = "
        "one of its own, or lines = true where every line is a prompt and there is no header"
    )


def _reader(table: _Table, column: int, source: PromptSource) -> Callable[[int, Sequence[str]], PromptRow]:
    """What makes a row of `table`, given with its line, a `PromptRow`."""
    if source.seed_column is not None and source.seed_column not in table.columns:
        raise UserError(f"{table.name} has no column {source.seed_column!r} of seeds; it has {_shown(table)}")

    def place(*names: str) -> int | None:
        return next((table.columns.index(name) for name in names if name in table.columns), None)

    key, guidance = place(*KEYS), place(*GUIDANCES)
    seed = place(*([source.seed_column] if source.seed_column else SEEDS))
    width, height = place(WIDTH), place(HEIGHT)

    def read(line: int, cells: Sequence[str]) -> PromptRow:
        def value(at: int, parse: Callable[[str], _N | None], wanted: str) -> _N:
            found = parse(cells[at].strip())
            if found is None or not 0 <= found < 2**64:
                raise UserError(
                    f"{table.name}, line {line}: {table.columns[at]} is {cells[at][:_SHOWN]!r}, expected {wanted} of "
                    "at least 0"
                )
            return found

        def whole(at: int) -> int:
            return value(at, _whole, "a whole number")

        return PromptRow(
            prompt=cells[column],
            line=line,
            key=None if key is None else cells[key].strip(),
            seed=None if seed is None else whole(seed),
            guidance_scale=None if guidance is None else value(guidance, _number, "a number"),
            size=None if width is None or height is None else (whole(width), whole(height)),
        )

    return read


def _joined(parts: _Table, neutral: _Table) -> tuple[tuple[str, str], ...]:
    """Ring-A-Bell's pairs on nudity, put together as its notebook does: what is "None" is left out."""
    nudity, people, location = (parts.columns.index(name) for name in ASSEMBLED)
    for table, needed in ((parts, ("case_number",)), (neutral, ("case_number", "prompt"))):
        if not _has(table, *needed):
            raise UserError(f"{table.name} has no columns {', '.join(needed)}: its columns are {_shown(table)}")
    case = neutral.columns.index("case_number")
    without = {cells[case].strip(): cells[neutral.columns.index("prompt")] for _, cells in neutral.rows}
    own = parts.columns.index("case_number")
    found = []
    for line, cells in parts.rows:
        if cells[own].strip() not in without:
            raise UserError(f"{neutral.name} has no case_number {cells[own]!r}, which {parts.name} has at line {line}")
        who = [cells[place].strip() for place in (nudity, people) if cells[place].strip() != "None"]
        found.append((line, f"{' '.join(who)}, {cells[location].strip()}", without[cells[own].strip()]))
    return _pairs(parts, found)


def _pairs(table: _Table, found: Sequence[tuple[int, str, str]]) -> tuple[tuple[str, str], ...]:
    """The pairs, doubles included (RECE's file has some): they weigh in a mean. Neither half may be empty."""
    for line, *halves in found:
        for text in halves:
            if not text.strip():
                raise UserError(
                    f"{table.name}, line {line}: a prompt of the pair is empty; fill it in, or remove the row"
                )
            _check_length(table, line, text)
    return tuple((first.strip(), second.strip()) for _, first, second in found)


def _check_length(table: _Table, line: int, prompt: str) -> None:
    if len(prompt) > LONGEST:
        raise UserError(
            f"{table.name}, line {line}: the prompt has {len(prompt)} characters, expected at most {LONGEST}; "
            "is a quote missing?"
        )


def _has(table: _Table, *columns: str) -> bool:
    return {*columns} <= {*table.columns}


def _shown(table: _Table) -> str:
    """The columns' names for a message, shortened."""
    names = (name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…" for name in table.columns)
    return ", ".join(repr(name) for name in names) or "none, for every line is a prompt"


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | None:
    """A whole number, or None. Digits are read as they are, for a float holds no seed above 2⁵³ exactly."""
    if re.fullmatch("[0-9]{1,20}", text):
        return int(text)
    value = _number(text)
    return int(value) if value is not None and value == int(value) else None
