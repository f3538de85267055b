"""Configuration tables and flags: what is read, and how mistakes are told."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pytest

from duo.errors import UserError
from duo.fields import LeafConfig, add_flags, as_said, as_table, build, given_flags, read_value


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float
    steps: int = 10
    rule: Literal["uniform", "late"] = "uniform"
    note: str | None = None
    clip: bool = False
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    named: Mapping[str, Inner] = field(default_factory=dict)
    leaf: LeafConfig | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


TABLE: dict[str, Any] = {
    "rate": 1,
    "steps": 5,
    "rule": "late",
    "note": "x",
    "clip": True,
    "words": ["a", "b"],
    "inner": {"width": 4},
    "many": [{"width": 5}, {}],
    "named": {"left": {"width": 6}},
    "leaf": {"name": "duo", "beta": 2.0},
}


def test_every_kind_of_field_is_built() -> None:
    outer = build(Outer, TABLE, "t")
    assert outer.rate == 1.0
    assert isinstance(outer.rate, float)
    assert outer.words == ("a", "b")
    assert outer.many == (Inner(width=5), Inner())
    assert outer.named["left"].width == 6
    assert outer.leaf == LeafConfig(name="duo", settings={"beta": 2.0})


def test_as_table_is_the_inverse_of_build() -> None:
    outer = build(Outer, TABLE, "t")
    assert build(Outer, as_table(outer), "t") == outer
    assert as_table(outer)["leaf"] == {"name": "duo", "beta": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stps": 3}, "t has no field 'stps' (did you mean 'steps'?)"),
        ({"steps": "3"}, "t.steps is '3', expected an integer"),
        ({"steps": True}, "t.steps is True, expected an integer"),
        ({"steps": 2.5}, "t.steps is 2.5, expected an integer"),
        ({"note": 3}, "t.note is 3, expected a string or nothing"),
        ({"clip": 1}, "t.clip is 1, expected true or false"),
        ({"rule": "early"}, "t.rule is 'early', expected one of 'uniform', 'late'"),
        ({"words": ["a", 3]}, "t.words[1] is ['a', 3], expected a list of a string"),
        ({"inner": {"wdth": 1}}, "t.inner has no field 'wdth' (did you mean 'width'?)"),
        ({"many": [{"width": "w"}]}, "t.many[0].width is 'w', expected an integer"),
        ({"named": {"left": {"width": None}}}, "t.named.left.width is None, expected an integer"),
        ({"leaf": {"beta": 1}}, "t.leaf is {'beta': 1}, expected a table with the name of a plugin: {name = …}"),
        ({"rate": float("inf")}, "t.rate is inf, which is not finite, expected a number"),
        ({"rate": float("nan")}, "t.rate is nan, which is not finite, expected a number"),
        ({"steps": 2**63}, "t.steps is 9223372036854775808, which does not fit in 64 bits, expected an integer"),
        ({"note": date(2020, 1, 1)}, "t.note is a date or a time, expected a string or nothing"),
        ({"words": ["a", date(2020, 1, 1)]}, "t.words is a date or a time, expected a list of a string"),
        ({"steps": 0}, "t: steps is 0, expected at least 1"),
    ],
)
def test_a_mistake_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build(Outer, {"rate": 1.0, **change}, "t")
    assert str(error.value) == message


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"^t: rate is missing, expected a number$"):
        build(Outer, {}, "t:")


def test_flags_hold_only_what_was_given() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Outer)
    given = parser.parse_args(["--rate", "2", "--no-clip", "--note", "7", "--words", '["a"]'])
    assert given_flags(given, Outer) == {"rate": 2.0, "clip": False, "note": "7", "words": ("a",)}
    assert given_flags(parser.parse_args([]), Outer) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ("word", "word"),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_are_read_as_toml(text: str, value: object) -> None:
    assert read_value(text) == value


def test_what_a_record_says_leaves_out_defaults_and_keeps_the_rest() -> None:
    assert as_said(Outer(rate=1.0)) == {"rate": 1.0}
    outer = Outer(rate=1.0, inner=Inner(width=2), leaf=LeafConfig(name="duo", settings={"beta": 1.0}))
    assert as_said(outer) == {"rate": 1.0, "inner": {"width": 2}, "leaf": {"name": "duo", "beta": 1.0}}
    assert as_said([Outer(rate=0.5, words=("x",)), Path("a")]) == [{"rate": 0.5, "words": ["x"]}, "a"]
