"""What hostile texts and names become on a terminal, on the page, in the card and in the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sealed
from damage import TEXTS, json_bytes
from ordeal import endure
from PIL import Image

from duo.cli import main
from duo.report import write_report
from duo.report.card import write_card
from duo.rundir import note, read_json, write_json
from duo.terminal import LONGEST, message

HIDDEN = re.compile("[\0-\x08\x0b-\x1f\x7f\x85\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ud800-\udfff]")
PROMPTS = {
    "markup": "<script>alert(1)</script><img src=x onerror=alert(1)>`x` [x](javascript:alert(1)) | {{ 7*7 }} {% raw %}",
    "hidden": "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066\u200f\0\x85\u2028\ud800",
    "YAML": "---\nlicense: mit\n---\n# heading",
    "long": "x " * 500_000,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed.write_run(tmp_path_factory.mktemp("texts") / "run", attacks={"prompts": (1, 0, 0)})


@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_a_report_shows_prompts_and_hides_nothing(run: Path, text: str) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("score/verdicts.jsonl", "attack/prompts/erased/attempts.jsonl", "pairs/pairs.jsonl"):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        rows = [
            {key: text if key.endswith("prompt") and value is not None else value for key, value in row.items()}
            for row in rows
        ]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    sealed.edit(run / "score" / "scores.json", {"concept": text, "method": text})
    sealed.seal(run)
    try:
        assert endure("run", lambda: write_report(run), writes=run) is None
        html, card = (run / "report.html").read_bytes().decode(), (run / "README.md").read_bytes().decode()
        assert read_json(run / "report.json")["concept"] == text
        for page in (html, card, (run / "report.json").read_bytes().decode()):
            assert not HIDDEN.search(page)
        assert "<script>alert" not in html and "<img src=x" not in html and "onerror=alert(1)>" not in html
        _, front, body = card.split("---\n", 2)  # the hub's metadata, which is YAML and no markup
        assert "<script>" not in body and "\n# heading" not in body and "\n---\n" not in f"{front}{body}"
        assert len(html) < 3_000_000
        endure("run", lambda: write_card(run), writes=run)
    finally:
        for path, data in before.items():
            path.write_bytes(data)


@pytest.mark.parametrize("text", TEXTS)
def test_a_message_is_one_line_that_moves_no_cursor(text: str) -> None:
    line = message(ValueError(f"x: {text}"))
    assert line.isprintable() and len(line) <= LONGEST


def test_a_message_tells_a_short_text_whole_and_a_long_one_cut() -> None:
    assert message(ValueError("a\n b\x1b[2Jé")) == "a b\\x1b[2Jé"
    assert len(message(ValueError("y" * 10**6))) == LONGEST and message(ValueError("y" * 10**6)).endswith("…")


def test_a_note_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    note("a\x1b[2J\u202e")
    assert capsys.readouterr().err == "note: a\\x1b[2J\\u202e\n"


COMMANDS = (
    ["run", "NAME.toml", "--out", "OUT"],
    ["report", "NAME"],
    ["check", "NAME"],
    ["leaderboard", "NAME"],
    ["merge", "NAME", "--out", "OUT"],
    ["export", "NAME", "--out", "OUT.safetensors"],
    ["pairs", "check", "NAME"],
    ["bench", "NAME.toml", "--out", "OUT"],
    ["attack", "toybox-fire", "--erased", "NAME", "--out", "OUT"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_name_of_any_bytes_is_told_in_one_line(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[2J\xe2\x80\xae")
    for there in (False, True):
        if there:
            Path(name).mkdir()
        given = [one.replace("NAME", name).replace("OUT", str(tmp_path / "out")) for one in command]
        assert main(given) == 2
        told = capsys.readouterr()
        *before, line = told.err.splitlines()
        assert line.startswith("duo: ") and line.isprintable()
        assert all(one.isprintable() for one in (*before, *told.out.splitlines()))


def test_the_command_line_prints_names_that_are_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    for side in ("unsafe", "safe"):
        (Path(name) / side).mkdir(parents=True)
        Image.new("RGB", (4, 4), side.replace("unsafe", "red").replace("safe", "blue")).save(
            Path(name) / side / "a.png"
        )
    command = [sys.executable, "-m", "duo", "pairs", "check", name]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0 and b"1 pairs, nothing wrong" in done.stdout and not done.stderr


def test_json_keeps_names_that_are_no_utf_8(tmp_path: Path) -> None:
    value: dict[str, Any] = {"path": "a\udcff", "text": "\ud800é"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "é".encode() in (tmp_path / "x.json").read_bytes()
    assert json.loads(json_bytes(value)) == value
