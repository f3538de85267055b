"""Prompts without their concept."""

from __future__ import annotations

from pathlib import Path

import pytest

from duo.concept import concept_names, load_concept
from duo.safe_part import SafePart

CONCEPT = """
title = "Fire"
words = ["burning", "on fire", "ablaze"]
anchor = "intact"
attack_pairs = [["a burning orange tree", "an orange tree"], ["a boat engulfed in flames, photo", "a boat, photo"]]
vector_pairs = [["a burning man's house by night", "a calm house by day"]]
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
[pairs]
unsafe = ["a house on fire (photo)", "a"]
safe = ["a dry house (photo)", "an"]
[prompts]
plain = ["a"]
"""


@pytest.fixture
def safe_part(tmp_path: Path) -> SafePart:
    (tmp_path / "fire.toml").write_text(CONCEPT)
    return SafePart(load_concept(tmp_path / "fire.toml"))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a burning orange boat", "an orange boat"),  # taken out, as its pair does, and the article goes with it
        ("An Burning house", "An house"),  # an article that is not as captions write it is left
        ("a red boat engulfed in flames, at night.", "a red boat, at night."),
        ("Burning house", "house"),
        ("a house on fire in the snow", "a house intact in the snow"),  # its pair differs in two places: the anchor
        ("an ablaze house (photo)", "an intact house (photo)"),  # of no pair
        ("a house, burning", "a house"),
        ("a house of burnings", None),  # whole words alone
        ("a house", None),
        ("burning", None),  # nothing is left
    ],
)
def test_by_hand(safe_part: SafePart, prompt: str, expected: str | None) -> None:
    assert safe_part(prompt) == expected


@pytest.mark.parametrize("name", concept_names())
def test_every_plain_prompt_of_a_shipped_concept_has_one(name: str) -> None:
    concept = load_concept(name)
    safe_part = SafePart(concept)
    for prompt in concept.prompts["plain"]:
        text = safe_part(prompt)
        assert text and text != prompt
        assert not any(f" {word.lower()} " in f" {text.lower()} " for word in concept.words)


def test_toyboxs_are_its_own_intact_captions() -> None:
    from duo.metrics.toybox_attributes import asked_for

    concept = load_concept("toybox-fire")
    safe_part = SafePart(concept)
    for prompt in concept.prompts["plain"]:
        text = safe_part(prompt)
        assert text is not None and asked_for(text) == asked_for(prompt)
        assert text.split()[0] == ("an" if text.split()[1][0] in "aeiou" else "a")
