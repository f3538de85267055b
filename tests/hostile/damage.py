"""What is done to a valid file: its values one by one, or its bytes. Hypothesis draws it, and shrinks it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

DEEP, ENDLESS, DATE, BIG = "@@deep@@", "@@endless@@", "@@date@@", "@@big@@"  # stand for what no value of Python is
RAW_JSON = {
    DEEP: "[" * 20_000 + "]" * 20_000,
    ENDLESS: '{"a":' * 20_000 + "1" + "}" * 20_000,
    DATE: '"1979-05-27"',
    BIG: "9" * 5000,
}
RAW_TOML = {
    DEEP: "[" * 900 + "]" * 900,
    ENDLESS: "{a=" * 150 + "1" + "}" * 150,
    DATE: "1979-05-27T07:32:00Z",
    BIG: "9" * 5000,
}
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    ".",
    "..",
    "../../../etc/passwd",
    "../outside.png",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "C:\\con",
    "~root/x",
    "a/b",
    "hub:",
    "hub:../..",
    "<script>alert(1)</script>",
    "<!--",
    "]]>",
    "\x1b[2J\x1b[31m",
    "\u202eabc",
    "\u2028",
    "\x85",
    "\ud800",
    "\udcff\udc80",
    "\U0010ffff",
    "%s%n{0}{x}",
    "nan",
    "1e999",
    "-1",
    "true",
    "null",
    "=cmd()",
    "x" * 300,
    "y" * 100_000,
    " " * 20_000,
    "a " * 20_000,
    "e\u0301" * 5_000,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    10**4000,
    -(10**4000),
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": ""},
    {"name": 1},
    [0] * 1000,
    ["a", 1],
    DEEP,
    ENDLESS,
    DATE,
    BIG,
    *TEXTS,
)
KEYS = ("extra", "", "\0", "__class__", "name", "schema", "config", "\u202e", "../x", "a.b", "é", "\ud800", "z" * 5000)
VALUE = st.one_of(
    st.sampled_from(VALUES),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
)
CHANGE = st.tuples(
    st.sampled_from(("replace", "replace", "replace", "remove", "add", "double", "swap")),
    st.integers(0, 2**20),
    VALUE,
    st.sampled_from(KEYS),
)
CHANGES = st.lists(CHANGE, min_size=1, max_size=3)  # of a value
CUT = st.tuples(
    st.sampled_from(("cut", "flip", "insert", "remove", "repeat", "zero")),
    st.floats(0, 1),
    st.integers(1, 64),
    st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from((b"\0", b"\xff\xfe", b'"', b"\n", b"\r", b"\x1b[2J"))),
)
CUTS = st.lists(CUT, min_size=1, max_size=4)  # of bytes


def changed(value: Any, changes: Sequence[tuple[str, int, Any, str]]) -> Any:
    """A copy of a JSON value in which fields were replaced, left out, added, doubled or exchanged."""
    whole = {"": copy.deepcopy(value)}
    for what, where, new, key in changes:
        places = list(_places(whole))
        holder, place = places[where % len(places)]
        if what == "remove" and holder is not whole:
            del holder[place]
        elif what == "add" and isinstance(holder[place], dict):
            holder[place][key] = copy.deepcopy(new)
        elif what == "add" and isinstance(holder[place], list):
            holder[place].append(copy.deepcopy(new))
        elif what == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place]))
        elif what == "swap":
            other, at = places[(where // 7) % len(places)]
            holder[place] = copy.deepcopy(other[at])
        else:
            holder[place] = copy.deepcopy(new)
    return whole[""]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a value, the nearest first."""
    found, level = [], [value]
    while level:
        below = []
        for one in level:
            inner = one.items() if isinstance(one, dict) else enumerate(one)
            for key, item in inner:
                found.append((one, key))
                if isinstance(item, (dict, list)):
                    below.append(item)
        level = below
    return found


def cut(data: bytes, cuts: Sequence[tuple[str, float, int, bytes]]) -> bytes:
    """Bytes in which some were cut off, flipped, put in, left out, repeated or set to zero."""
    for what, share, count, new in cuts:
        at = min(int(share * len(data)), max(len(data) - 1, 0))
        if what == "cut":
            data = data[:at]
        elif what == "insert":
            data = data[:at] + new + data[at:]
        elif what == "remove":
            data = data[:at] + data[at + count :]
        elif what == "repeat":
            data = data[:at] + data[at : at + count] * 3 + data[at + count :]
        elif what == "zero":
            data = data[:at] + bytes(min(count, len(data) - at)) + data[at + count :]
        elif data:
            data = data[:at] + bytes([data[at] ^ new[0] or 1]) + data[at + 1 :]
    return data


def json_bytes(value: Any) -> bytes:
    """A value as JSON, lone surrogates as escapes, NaN as Python writes it; the stand-ins written out."""
    text = json.dumps(value)
    for name, raw in RAW_JSON.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def toml_bytes(value: Any) -> bytes:
    """A table as TOML, every value inline: no more than is needed to write what is wrong."""
    table = value if isinstance(value, dict) else {"": value}
    lines = "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in table.items() if value is not None)
    for name, raw in RAW_TOML.items():
        lines = lines.replace(json.dumps(name), raw)
    return lines.encode(errors="surrogatepass")


def _key(key: str) -> str:
    return _text(key)


def _text(text: str) -> str:
    """A basic string; a lone surrogate is written as its bytes, which are no UTF-8."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_toml(one)}" for k, one in value.items() if one is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(one) for one in value if one is not None) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return str(value) if value != value or abs(value) == float("inf") else f"{value!r}".replace("e", "e")
    return json.dumps(value)
