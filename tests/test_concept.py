"""Concept files."""

from __future__ import annotations

from pathlib import Path

import pytest

from duo.concept import concept_names, load_concept
from duo.errors import UserError

CONCEPT = """
title = "Fire"
words = ["fire"]
anchor = "intact"
attack_pairs = [["a burning tree", "a tree"]]
vector_pairs = [["a burning house", "a house"]]
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
[pairs]
unsafe = ["a burning red house"]
safe = ["a red house"]
[prompts]
plain = ["a burning blue boat"]
unrelated = ["a green ball"]
[near_miss.sunset]
prompts = ["a red house at sunset"]
attribute = "extra"
[validation.prompts]
plain = ["a flaming yellow tent"]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "small-fire.toml"
    path.write_text(text)
    return path


def test_a_concept_is_read(tmp_path: Path) -> None:
    concept = load_concept(write(tmp_path, CONCEPT))
    assert concept.name == "small-fire"
    assert concept.curator.settings == {"hazard": "fire", "role": "curate"}
    assert concept.vector_pairs == (("a burning house", "a house"),)
    assert concept.prompt_set("plain") == ("a burning blue boat",)
    assert concept.prompt_set("plain", validation=True) == ("a flaming yellow tent",)
    assert concept.sets(validation=True).near_miss == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('safe = ["a red house"]', "safe = []", "1 unsafe and 0 safe prompts; they must pair up"),
        ('attribute = "extra"', "", "give one of attribute and judge"),
        ("anchor", "anchr", r"has no field 'anchr' \(did you mean 'anchor'\?\)"),
        ('unrelated = ["a green ball"]', "unrelated = []", "the set of prompts 'unrelated' is empty"),
        ('words = ["fire"]', "words = ", "is not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"small-fire\.toml.*{message}"):
        load_concept(write(tmp_path, CONCEPT.replace(old, new)))


def test_unknown_names_come_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no set 'plan' \(did you mean 'plain'\?\)"):
        load_concept(write(tmp_path, CONCEPT)).prompt_set("plan")
    with pytest.raises(UserError, match="no concept is called 'no-such-concept'"):
        load_concept("no-such-concept")
    with pytest.raises(UserError, match=r"cannot read .*absent\.toml"):
        load_concept(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", concept_names())
def test_shipped_concepts_load(name: str) -> None:
    assert load_concept(name).name == name
