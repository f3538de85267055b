"""CSVs and text files of prompts, captions and pairs, and folders of pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import CHANGES, CUTS, TEXTS, changed, cut, json_bytes
from hypothesis import given
from hypothesis import strategies as st
from ordeal import cases, endure
from PIL import Image

from duo.captions import read_captions
from duo.errors import UserError
from duo.pairs import PairFiles, Pairs
from duo.promptsets import PromptSource, read_pairs, read_prompts

CELL = st.one_of(st.sampled_from(TEXTS), st.text(max_size=30), st.integers().map(str), st.floats().map(str))
ROWS = st.lists(st.lists(CELL, max_size=5), max_size=4)
QUOTES = st.sampled_from(("none", "some", "all"))


def csv_bytes(head: list[str], rows: list[list[str]], quotes: str) -> bytes:
    """A CSV, in which quotes may be missing or not be doubled."""

    def cell(text: str) -> str:
        return {"none": text, "some": f'"{text}"', "all": '"' + text.replace('"', '""') + '"'}[quotes]

    return "\n".join(",".join(map(cell, row)) for row in [head, *rows]).encode(errors="surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hostile")
    for side, colour in (("unsafe", "red"), ("safe", "blue")):
        for index in range(2):
            path = made / "pairs" / side / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), colour).save(path)
    return made


@cases("captions")
@given(st.sampled_from((".txt", ".csv")), ROWS, QUOTES, CUTS, st.booleans())
def test_captions_are_read_or_refused(
    folder: Path, ending: str, rows: Any, quotes: str, cuts: Any, whole: bool
) -> None:
    path = folder / f"captions{ending}"
    data = csv_bytes(["prompt", "seed"], [["a boat", "1"], *rows], quotes)
    path.write_bytes(data if whole else cut(data, cuts))
    endure("captions", lambda: read_captions(path), writes=folder)


HEAD = [
    "prompt",
    "evaluation_seed",
    "evaluation_guidance",
    "case_number",
    "categories",
    "sd_image_width",
    "sd_image_height",
]
FILTERS = ("nudity > 50", "categories has sexual", "prompt != x", "evaluation_seed <= 3", "sd_image_width = 512")


@cases("prompt set")
@given(ROWS, QUOTES, CUTS, st.booleans(), st.booleans(), st.sampled_from((None, *FILTERS)))
def test_a_prompt_set_is_read_or_refused(
    folder: Path, rows: Any, quotes: str, cuts: Any, whole: bool, lines: bool, wanted: str | None
) -> None:
    path = folder / "prompts.csv"
    own = [(row + [""] * len(HEAD))[: len(HEAD)] if quotes == "all" else row for row in rows]
    data = csv_bytes(HEAD, [["a boat", "1", "7.5", "3", "sexual, x", "512", "512"], *own], quotes)
    path.write_bytes(data if whole else cut(data, cuts))
    filters = () if wanted is None or lines else (wanted,)
    source = PromptSource(path=str(path), lines=lines, filters=filters)
    endure("prompt set", lambda: read_prompts(source), writes=folder)


@pytest.mark.parametrize(
    "text", ["a" + " " * 60_000, " " * 60_000, "a" * 60_000 + "=", "> " * 30_000, "a > " + "9" * 60_000]
)
def test_a_filter_of_any_length_is_told_at_once(folder: Path, text: str) -> None:
    def read() -> None:
        try:
            PromptSource(path="x.csv", filters=(text,))
        except ValueError as error:
            raise UserError(str(error)) from error

    endure("prompt set", read, writes=folder)


@cases("vector pairs")
@given(
    st.sampled_from((("sensitive prompt", "normal prompt"), ("prompt", "prompt1"), ("nudity", "people", "location"))),
    ROWS,
    QUOTES,
    CUTS,
    st.booleans(),
)
def test_vector_pairs_are_read_or_refused(
    folder: Path, head: Any, rows: Any, quotes: str, cuts: Any, whole: bool
) -> None:
    path, neutral = folder / "vectors.csv", folder / "neutral.csv"
    names = [*head, "case_number"]
    data = csv_bytes(names, [["a", "b", "c", "1"][: len(names)], *rows], quotes)
    path.write_bytes(data if whole else cut(data, cuts))
    neutral.write_bytes(csv_bytes(["case_number", "prompt"], [["1", "x"], *rows], quotes))
    given = str(neutral) if len(head) == 3 else None
    endure("vector pairs", lambda: read_pairs(str(path), given), writes=folder)


@cases("pairs CSV")
@given(ROWS, QUOTES, CUTS, st.booleans())
def test_a_csv_of_pairs_is_read_or_refused(folder: Path, rows: Any, quotes: str, cuts: Any, whole: bool) -> None:
    path = folder / "pairs.csv"
    data = csv_bytes(["unsafe", "safe", "note"], [["pairs/unsafe/0000.png", "pairs/safe/0000.png", "x"], *rows], quotes)
    path.write_bytes(data if whole else cut(data, cuts))
    endure("pairs CSV", lambda: Pairs.read(path), writes=folder)
    assert all(isinstance(one, str) for one in PairFiles.find(path).check())


@cases("pairs folder")
@given(st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS)))
def test_a_folder_of_pairs_is_read_or_refused(folder: Path, damage: Any) -> None:
    rows = [{"unsafe": f"unsafe/{i:04d}.png", "unsafe_prompt": "a fire", "decision": "keep"} for i in range(2)]
    path = folder / "pairs" / "pairs.jsonl"
    kind, how = damage
    if kind == "fields":
        new = changed(rows, how)
        path.write_bytes(b"".join(json_bytes(row) + b"\n" for row in (new if isinstance(new, list) else [new])))
    else:
        path.write_bytes(cut("".join(json.dumps(row) + "\n" for row in rows).encode(), how))
    endure("pairs folder", lambda: Pairs.read(folder / "pairs"), writes=folder)
    endure("pairs folder", lambda: PairFiles.find(folder / "pairs").check(), writes=folder)


def test_names_that_are_no_utf_8_are_read(tmp_path: Path) -> None:
    for side, colour in (("unsafe", "red"), ("safe", "blue")):
        (tmp_path / side).mkdir()
        Image.new("RGB", (4, 4), colour).save(os.fsdecode(os.fsencode(tmp_path / side) + b"/\xff\xfe\x1b[2J.png"))
    assert endure("pairs folder", lambda: Pairs.read(tmp_path).digest(), writes=tmp_path) is None


@pytest.mark.parametrize(
    "read", [read_captions, lambda path: Pairs.read(path), lambda path: read_prompts(PromptSource(path=str(path)))]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_refused(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "x.csv"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert endure("captions", lambda: read(path), writes=tmp_path)
