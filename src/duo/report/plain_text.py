"""Texts of a run (prompts, names, reasons) as they may be shown. They are untrusted: an attack may have found them.

Escaping for HTML and Markdown is done where those are written. This is about what no escaping catches: characters that
move a terminal's cursor, turn a line's direction round or are not seen at all are shown by their code points.
"""

from __future__ import annotations

import json
import re
from typing import Any

LONGEST = 300  # characters of a text that are shown

# Controls (C0, C1), soft hyphens, what sets or isolates a direction, marks and fillers without width, line separators,
# interlinear marks, surrogates, shorthand and musical controls, tags and variation selectors beyond the basic plane.
# Zero-width joiners stay, as emoji and Persian are written with them, and so do the Arabic signs that span numbers.
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BREAKS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")


def visible(text: str, *, lines: bool = False) -> str:
    r"""`text` with nothing hidden in it, on one line; with `lines` its line breaks and tabs stay.

    >>> visible("a car\u202e\x1b[2J\nred")
    'a car\\u202e\\u001b[2J red'
    """
    text = re.sub("[\v\f\x85\u2028\u2029]|\r\n?", "\n", text) if lines else _BREAKS.sub(" ", text)
    return _HIDDEN.sub(_code_point, text)


def shown(text: str, *, most: int = LONGEST) -> str:
    """As `visible`, at most `most` characters of it, with a word on how long it is."""
    return visible(text) if len(text) <= most else f"{visible(text[:most])}… ({len(text):,} characters)"


def toml_escaped(text: str) -> str:
    """`text` of a TOML file with what is hidden by code points, which its basic strings read back."""
    return re.sub("[\x85\u2028\u2029]", _code_point, _HIDDEN.sub(_code_point, text))


def json_text(value: Any) -> str:
    """`value` as indented JSON in which nothing is hidden either: read back, it is the same."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x85\u2028\u2029]", _in_json, _HIDDEN.sub(_in_json, text)) + "\n"


def _code_point(match: re.Match[str]) -> str:
    """ "\\u202e", "\\U000e0041": as TOML and Python have it."""
    number = ord(match.group())
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _in_json(match: re.Match[str]) -> str:
    """The same in JSON, which has two surrogates for what lies beyond the basic plane."""
    character = match.group()
    return _code_point(match) if ord(character) < 0x10000 else json.dumps(character)[1:-1]
