"""Sexual concepts that mention minors are refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from duo.concept import concept_names, load_concept
from duo.errors import UserError
from duo.refusal import is_sexual, minor_inside, minor_mentioned, refused, words_of

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
        ("eighteen months old", "eighteen months old"),
        ("20 months old", "20 months old"),
        ("a young woman", "young"),
        ("mother and son", "son"),
        # ages
        ("a naked 15 y/o", "15 y"),
        ("13 y.o.", "13 y"),
        ("13 y o", "13 y"),
        ("17 y/o", "17 y"),
        ("a 16y woman", "16 y"),
        ("14f", "14 f"),
        ("(15M) portrait", "15 m"),
        ("13yearold", "13 yearold"),
        ("sixteenyearold", "sixteenyearold"),
        ("a nude figure at the age of twelve", "age of twelve"),
        ("aged about 15", "aged about 15"),
        ("Age: 9", "age 9"),
        ("under 17", "under 17"),
        ("under sixteen", "under sixteen"),
        ("under eighteen", "under eighteen"),
        ("the under-12s", "under 12"),
        ("below 18", "below 18"),
        ("less than 18 years old", "less than 18"),
        ("not yet eighteen", "not yet eighteen"),
        ("her 16th birthday", "16 th birthday"),
        ("sixteen", "sixteen"),
        ("sweet sixteen", "sweet sixteen"),
        ("a nude woman, 15, on a bed", "15"),
        ("a nude woman, twelve", "twelve"),
        # school and family
        ("nude high schooler", "schooler"),
        ("middle-schooler", "schooler"),
        ("highschool", "highschool"),
        ("first grader", "grader"),
        ("in 7th grade", "th grade"),
        ("sophomore", "sophomore"),
        ("jr. high", "jr high"),
        ("pupil", "pupil"),
        ("tweenager", "tweenager"),
        ("babygirl", "babygirl"),
        ("nude granddaughter", "granddaughter"),
        ("niece", "niece"),
        ("little sister", "little sister"),
        ("nymphet", "nymphet"),
        ("prepubertal", "prepubertal"),
        ("neonate", "neonate"),
        ("gurl", "gurl"),
        ("girly", "girly"),
        # disguises
        ("a nude g\u0456rl", "girl"),
        ("g\u0131rl", "girl"),
        ("\u0261irl", "girl"),
        ("\u0421\u041dILD", "child"),
        ("g1rl", "girl"),
        ("l0li", "loli"),
        ("1oli", "loli"),
        ("t33ns", "teens"),
        ("h1gh sch00l", "high school"),
        ("g-i-r-l", "girl"),
        ("a g i r l", "girl"),
        ("G. 1. R. L.", "girl"),
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
        "a man of eighteen, a woman of 18, 19 and 20",
        "under two trees, below 10 degrees, in less than 5 minutes",
        "sixteen women, fifteen red lanterns, thirteen people",
        "turned 15 degrees",
        "a 14mm lens at f/1.4, 12 m away",
        "a girlfriend, glass, a classic, persons between salads",
        "7, 0, 7, 10, 12",
        "4k photo, 3d render, 1980s, b/w, x-y-z",
        "0012",
        "photo (12)",
        "J. R. R. Tolkien at the age of 60",
    ],
)
def test_whole_words_only_and_adults_are_none(text: str) -> None:
    assert minor_mentioned(text) is None


def test_sexual_words() -> None:
    assert is_sexual(["a tree", "a Nude portrait"])
    assert not is_sexual(["a sextant", "Essex", "nudge"])


@pytest.mark.parametrize(
    "text",
    [
        "lolicon artwork",
        "shotacon",
        "a woman showing her tits",
        "boobs",
        "pussy",
        "masturbating",
        "intercourse",
        "orgasm",
        "panties",
        "bottomless",
        "a bare-breasted woman",
        "a woman without clothes",
        "a woman wearing nothing",
        "n4ked",
        "n u d e",
    ],
)
def test_words_and_phrases_that_are_sexual(text: str) -> None:
    assert is_sexual([text])


@pytest.mark.parametrize("text", ["lolicon artwork", "loli", "shota", "shotacon", "jailbait", "l0li"])
def test_words_that_are_sexual_and_of_minors_are_always_refused(tmp_path: Path, text: str) -> None:
    concept = CONCEPT.replace("WORD", "flood").replace("a red car", text)
    with pytest.raises(UserError, match="mentions a minor"):
        load_concept(write(tmp_path, concept))


def test_glued_words_of_found_prompts_are_looked_into() -> None:
    assert minor_mentioned("girlnaked woman") is None
    assert minor_inside("girlnaked woman") == "girl"
    assert minor_inside("zxqch1ldren") == "children"
    assert minor_inside("a glass, persons between salads, a boyfriend, putting kid") is None, "too common, or too short"
    assert minor_inside("her girlfriend") == "girl"
    assert minor_inside("her girlfriend", vetted=words_of(["A woman's Girlfriend"])) is None


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


def test_the_texts_of_a_concept_are_read_once_and_not_for_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    concept = load_concept("toybox-fire")
    monkeypatch.setattr("duo.concept.is_sexual", lambda _: pytest.fail("they were read again"))
    assert not concept.adults_only


@pytest.mark.parametrize("part", ["a ", "a$", "g-1-r ", "1 ", "e\u0301 ", "aged at "])
def test_a_text_of_any_length_is_read_in_a_time_that_grows_with_it(part: str) -> None:
    """Runs of single letters took a minute for a million characters."""
    text, began = part * (100_000 // len(part)), time.process_time()
    assert refused(text, adults_only=True, vetted=frozenset()) is None
    assert time.process_time() - began < 3
