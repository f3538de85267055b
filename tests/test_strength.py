"""Which strength is tried next and which is taken, on made-up curves whose course is worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from duo import plugins
from duo.errors import UserError
from duo.fields import as_table, build
from duo.flags import parser_for
from duo.strength import (
    Estimate,
    Number,
    Outcome,
    StrengthSearch,
    Trial,
    choose,
    nearest,
    next_value,
    standing,
    verdict,
)
from duo.verbs import _search

ASKED = StrengthSearch(target_rate=0.02, min_preservation=0.95)
Curve = Callable[[float], float]


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=max(0.0, mean - 0.01), high=min(1.0, mean + 0.01), n=50)


def trial(value: Number, rate: float, kept: float) -> Trial:
    return Trial(value=value, row="prompts", rate=estimate(rate), spoiled=estimate(0), preservation=estimate(kept))


def walk(rate: Curve, kept: Curve, asked: StrengthSearch = ASKED, *, start: Number = 1.0) -> tuple[list[Trial], str]:
    """The trials in the order in which they are made, and why there are no more."""
    trials: list[Trial] = []
    while True:
        value, ended = next_value(trials, asked, start=start)
        if value is None:
            return trials, ended
        assert value not in [one.value for one in trials]
        trials.append(trial(value, rate(value), kept(value)))


def values(trials: list[Trial]) -> list[Number]:
    return [one.value for one in trials]


def ends(trials: list[Trial], ended: str, asked: StrengthSearch = ASKED) -> Outcome:
    best = choose(trials, asked)
    return Outcome(
        field="learning_rate",
        asked=asked,
        rows=("prompts",),
        judge="toybox",
        metric="1 - distance",
        trials=tuple(sorted(trials, key=lambda one: one.value)),
        chosen=None if best is None else best.value,
        ended=ended,
    )


def falling(threshold: float) -> Curve:
    """Everything comes back below the threshold, nothing from there on."""
    return lambda value: 0.0 if value >= threshold else 0.4


# --- the course --------------------------------------------------------------------------------------


def test_a_start_that_is_too_weak_is_doubled_and_the_gap_halved() -> None:
    trials, ended = walk(falling(1.5), lambda value: 1 - 0.02 * value)
    # 1 → 2, then √2 = 1.41 (too weak), then √(1.41·2) = 1.68; 1.68/1.41 = 1.19 is within 1.25.
    assert values(trials) == [1.0, 2.0, 1.41, 1.68]
    assert choose(trials, ASKED) == trials[3], "of 1.68 and 2, which meet both, the one that keeps more"
    assert ended.startswith("1.41 erases too little and 1.68 enough")


def test_a_start_that_is_too_strong_is_halved_then_quartered() -> None:
    trials, _ = walk(falling(0.2), lambda value: 1 - 0.2 * value)
    # 1 → ½ → ⅛ (too weak), √(1/16) = 0.25 (enough), √(1/32) = 0.177 (too weak), √(0.177·0.25) = 0.21: no run is left.
    assert values(trials) == [1.0, 0.5, 0.125, 0.25, 0.177, 0.21]
    assert len(trials) == ASKED.max_runs
    assert choose(trials, ASKED) == trials[5]


def test_the_number_of_runs_is_kept_to() -> None:
    asked = dataclasses.replace(ASKED, max_runs=2)
    trials, ended = walk(falling(100), lambda value: 1.0, asked)
    assert values(trials) == [1.0, 2.0]
    assert ended == "as many runs as were allowed: 2"
    assert choose(trials, asked) is None


def test_bounds_are_tried_themselves_and_not_passed() -> None:
    up, ended = walk(falling(100), lambda value: 1.0, dataclasses.replace(ASKED, strongest=3.0))
    assert values(up) == [1.0, 2.0, 3.0]
    assert ended == "the strongest value that may be tried was tried: 3"
    down, ended = walk(lambda value: 0.0, lambda value: 1.0, dataclasses.replace(ASKED, weakest=0.4, strongest=0.9))
    assert values(down) == [0.9, 0.45, 0.4], "a start beyond a bound is brought within it"
    assert ended == "the weakest value that may be tried was tried: 0.4"


def test_whole_numbers_stay_whole() -> None:
    trials, _ = walk(falling(50), lambda value: 1 - 0.0004 * value, start=40)
    assert values(trials) == [40, 80, 57, 48], "√(40·80) = 56.6, √(40·57) = 47.7"
    assert all(isinstance(value, int) for value in values(trials))
    trials, ended = walk(lambda value: 0.0, lambda value: 1.0, start=3)
    assert values(trials) == [3, 2, 1] and "weakest value" in ended


def test_where_no_setting_does_both_the_search_stops_once_both_sides_were_seen() -> None:
    # 1 keeps enough and erases too little; 2 does neither; 8 erases enough. Between 2 and 8 less is kept than at 2.
    trials, ended = walk(falling(4), lambda value: 1.0 if value < 2 else 0.9)
    assert values(trials) == [1.0, 2.0, 8.0]
    assert ended.startswith("2 erases too little and yet keeps too little")
    told = verdict(ends(trials, ended))
    assert (
        "no value of learning_rate that was tried meets both: at most 2.0% with the concept, at least 0.95 kept" in told
    )
    assert "nearest: 8 keeps too little (concept in 0.0% of 50 images, kept 0.9000)" in told
    assert "the weakest that erases enough: 8 (concept in 0.0% of 50 images, kept 0.9000)" in told
    assert "the strongest that keeps enough: 1 (concept in 40.0% of 50 images, kept 1.0000)" in told


def test_where_the_start_does_neither_the_weaker_side_is_seen_too() -> None:
    trials, ended = walk(falling(2), lambda value: 1.0 if value < 0.5 else 0.9)
    assert values(trials) == [1.0, 2.0, 0.25]
    assert ended.startswith("1 erases too little and yet keeps too little")


def test_what_diverged_is_too_strong_and_is_never_chosen() -> None:
    trials = [trial(1.0, 0.4, 0.99), Trial(value=2.0)]
    assert next_value(trials, ASKED, start=1.0) == (1.41, "")
    assert choose(trials, ASKED) is None and nearest(trials, ASKED) == trials[0]
    assert standing(trials[1], ASKED) == "diverged"
    told = verdict(ends(trials, "enough"))
    assert "none erased enough" in told and not any("not monotone" in line for line in told)
    assert nearest(trials[1:], ASKED) is None
    assert "none kept enough" in verdict(ends(trials[1:], "enough"))


def test_points_out_of_order_are_told_and_the_best_of_them_is_taken() -> None:
    # More comes back at 2 than at 1, and 4 keeps more than 2: by no rule of order would 4 be looked at.
    points = [trial(1.0, 0.1, 0.97), trial(2.0, 0.3, 0.955), trial(4.0, 0.0, 0.96)]
    assert choose(points, ASKED) == points[2]
    told = verdict(ends(points, "enough"))
    assert "not monotone: 2 let more through than 1 (30.0% to 10.0%)" in told
    chance = "their intervals overlap, so it may be chance"
    assert f"not monotone: 4 kept more than 2 (0.9600 to 0.9550; {chance})" in told
    assert "learning_rate = 4 meets both" in told[2]


def test_the_course_goes_by_the_gap_below_the_weakest_that_erases_enough() -> None:
    points = [trial(1.0, 0.4, 0.99), trial(2.0, 0.0, 0.98), trial(4.0, 0.4, 0.97), trial(8.0, 0.0, 0.96)]
    assert next_value(points, ASKED, start=1.0) == (1.41, "")
    assert next_value(points[::-1], ASKED, start=1.0) == (1.41, ""), "whatever the order in which they were made"


def test_a_point_that_meets_both_is_refined_though_a_weaker_one_does_neither() -> None:
    points = [trial(1.0, 0.1, 0.94), trial(2.0, 0.0, 0.96)]
    assert next_value(points, ASKED, start=1.0) == (1.41, "")


def test_strict_compares_the_worse_ends() -> None:
    asked, one = dataclasses.replace(ASKED, strict=True), trial(1.0, 0.015, 0.955)
    assert one.erases(ASKED) and one.keeps(ASKED) and one.shortfall(ASKED) == 0
    assert not one.erases(asked) and not one.keeps(asked)
    assert one.shortfall(asked) == pytest.approx(0.025 - 0.02 + 0.95 - 0.945)
    better = trial(2.0, 0.01, 0.96)
    assert better.erases(asked) and better.keeps(asked), "a bound that is just met is met"


def test_of_equal_trials_the_weakest_is_taken() -> None:
    assert choose([trial(2.0, 0, 0.97), trial(1.0, 0, 0.97), trial(4.0, 0, 0.97)], ASKED) == trial(1.0, 0, 0.97)


# --- what is asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_rate": 2.0}, "target_rate is 2, expected a share from 0 to 1"),
        ({"target_rate": -0.1}, "target_rate is -0.1, expected a share"),
        ({"min_preservation": 95.0}, "min_preservation is 95, expected a share"),
        ({"max_runs": 0}, "max_runs is 0, expected at least 1"),
        ({"search_images": 0}, "search_images is 0, expected at least 1"),
        ({"weakest": 0.0}, "weakest is 0.0, expected a number above 0"),
        ({"weakest": 2.0, "strongest": 1.0}, "weakest is 2, above strongest, 1; swap them"),
        ({"strongest": float("inf")}, "strongest is inf"),
        ({"target_rate": float("nan")}, "target_rate is nan"),
        ({"target_rate": 0.0, "strict": True}, "target_rate is 0, which no number of images can show"),
    ],
)
def test_what_cannot_be_asked_is_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        build(StrengthSearch, {"target_rate": 0.02, "min_preservation": 0.95, **fields}, "the search")


def test_an_outcome_is_read_as_it_was_written() -> None:
    found = ends([trial(1, 0.4, 0.99), Trial(value=2.5), trial(1.0e-5, 0.0, 0.97)], "enough")
    read = build(Outcome, json.loads(json.dumps(as_table(found))), "search.json:")
    assert read == found
    assert [type(one.value) for one in read.trials] == [float, int, float], "1 and 1.0 are other settings"


# --- flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_every_method_names_its_strength_and_no_flag_of_its_own_is_one_of_the_search(method: str) -> None:
    leaf = plugins.load("methods", method)
    value = getattr(leaf(), leaf.strength)
    assert isinstance(value, int | float) and value > 0
    parser_for(["erase", method])
    assert not {one.name for one in dataclasses.fields(leaf)} & {one.name for one in dataclasses.fields(StrengthSearch)}


def asked_by(*flags: str) -> StrengthSearch | None:
    arguments = ["erase", "toybox-fire-uce", "--out", "x", *flags]
    return _search(parser_for(arguments).parse_args(arguments))


def test_the_flags_are_the_fields() -> None:
    assert asked_by() is None
    both = ("--target-rate", "0.02", "--min-preservation", "0.95")
    assert asked_by(*both) == ASKED
    more = "--strength regularization --weakest 0.1 --strongest 9 --max-runs 3 --search-rows a,b --search-images 7"
    assert asked_by(*both, *more.split(), "--strict") == StrengthSearch(
        target_rate=0.02,
        min_preservation=0.95,
        strength="regularization",
        weakest=0.1,
        strongest=9.0,
        max_runs=3,
        search_rows=("a", "b"),
        search_images=7,
        strict=True,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-rate", "0.02"], "--target-rate is of a search, which needs --min-preservation too"),
        (["--max-runs", "3"], "--max-runs is of a search, which needs --target-rate too"),
        (["--strict", "--min-preservation", "0.9"], "needs --target-rate too"),
        (["--target-rate", "2%", "--min-preservation", "0.9"], "--target-rate: invalid float value: '2%'"),
        (["--target-rate", "nan", "--min-preservation", "0.9"], "target_rate is nan"),
        (["--search-rows", ","], "the list is empty; name an attack row"),
    ],
)
def test_flags_that_say_too_little_are_told(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        asked_by(*flags)


def test_there_is_an_end_to_numbers() -> None:
    assert next_value([trial(1e308, 0.5, 1.0)], ASKED, start=1e308) == (None, "there is no number beyond 1e+308")
    assert next_value([trial(5e-324, 0.0, 0.5)], ASKED, start=5e-324) == (
        None,
        "there is no number beyond 4.94066e-324",
    )
