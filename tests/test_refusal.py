"""Sexual concepts that mention minors are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from duo.concept import concept_names, load_concept
from duo.errors import UserError
from duo.refusal import is_sexual, minor_mentioned

CONCEPT = """
title = "Bareness"
words = ["WORD"]
anchor = "clothed"
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
attack_pairs = [["a man", "a clothed man"]]
vector_pairs = [["a man", "a clothed man"]]
[pairs]
unsafe = ["a woman"]
safe = ["a dressed woman"]
[prompts]
plain = ["a woman outdoors"]
unrelated = ["a red car"]
[near_miss.statue]
prompts = ["a marble statue of a man"]
judge = {name = "toybox", hazard = "graffiti"}
[validation.prompts]
plain = ["a man outdoors"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a girl", "girl"),
        ("two School-Girls' uniforms", "girls"),
        ("a SCHOOLGIRL", "schoolgirl"),
        ("under-age", "under age"),
        ("a high_school party", "high school"),
        ("a teén", "teen"),
        ("a ch\u200bild", "child"),
        ("\uff47\uff49\uff52\uff4c", "girl"),
        ("a 15 year old", "15 year"),
        ("a 15yo woman", "15 yo"),
        ("a 17-year-old", "17 year"),
        ("a woman aged 16", "aged 16"),
        ("age seventeen", "age seventeen"),
        ("sixteen-year-old", "sixteen year"),
        ("eighteen months old", None),
        ("20 months old", "20 months old"),
        ("a young woman", "young"),
        ("mother and son", "son"),
    ],
)
def test_minors_are_found(text: str, found: str | None) -> None:
    assert minor_mentioned(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "a woman and her boyfriend",
        "a kidney, a babysitter's car, a sonata, an infantry man",
        "an 18 year old woman",
        "a twenty-one year old man",
        "a man aged 60",
        "a statue of the year 12",
        "5 people, 10 minutes later",
        "",
    ],
)
def test_whole_words_only_and_adults_are_none(text: str) -> None:
    assert minor_mentioned(text) is None


def test_sexual_words() -> None:
    assert is_sexual(["a tree", "a Nude portrait"])
    assert not is_sexual(["a sextant", "Essex", "nudge"])


@pytest.mark.parametrize(
    "place",
    [
        'unsafe = ["a woman"]',
        'safe = ["a dressed woman"]',
        'plain = ["a woman outdoors"]',
        'unrelated = ["a red car"]',
        'prompts = ["a marble statue of a man"]',
        'plain = ["a man outdoors"]',
        'anchor = "clothed"',
        'title = "Bareness"',
        '[["a man", "a clothed man"]]\n[pairs]',
    ],
)
@pytest.mark.parametrize("how", ["flag", "word", "nudenet"])
def test_no_text_of_a_sexual_concept_may_mention_a_minor(tmp_path: Path, place: str, how: str) -> None:
    text = CONCEPT.replace("WORD", "nudity" if how == "word" else "bareness")
    text = f"sexual = true\n{text}" if how == "flag" else text
    if how == "nudenet":
        text = text.replace('judge = {name = "toybox", hazard = "fire"}', 'judge = {name = "nudenet"}')
    assert load_concept(write(tmp_path, text)).adults_only
    assert place in text
    worse = place[::-1].replace('"', '"lrig a ', 1)[::-1]
    with pytest.raises(UserError, match=r"own\.toml: \S+ mentions a minor \('girl'\), and this is a sexual concept"):
        load_concept(write(tmp_path, text.replace(place, worse)))


def test_other_concepts_may(tmp_path: Path) -> None:
    text = CONCEPT.replace("WORD", "flood").replace("a red car", "a child with a red car")
    assert not load_concept(write(tmp_path, text)).adults_only


@pytest.mark.parametrize("name", concept_names())
def test_only_nudity_is_sexual_of_what_is_shipped(name: str) -> None:
    assert load_concept(name).adults_only == (name == "nudity")
