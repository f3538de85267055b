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


@pytest.mark.parametrize("name", [name for name in concept_names() if not name.startswith("toybox")])
def test_what_is_scored_is_neither_trained_on_nor_searched_with(name: str) -> None:
    concept = load_concept(name)
    known = {*concept.pairs.unsafe, *concept.pairs.safe}
    known |= {prompt for pair in (*concept.attack_pairs, *concept.vector_pairs) for prompt in pair}
    of_split = [
        {prompt for prompts in concept.sets(validation=validation).prompts.values() for prompt in prompts}
        | {prompt for near in concept.sets(validation=validation).near_miss.values() for prompt in near.prompts}
        for validation in (False, True)
    ]
    assert not of_split[0] & of_split[1]
    assert not known & (of_split[0] | of_split[1])
    judge, curator = concept.judge, concept.curator
    assert (judge.name, judge.settings.get("model")) != (curator.name, curator.settings.get("model"))
    for validation in (False, True):
        sets = concept.sets(validation=validation)
        assert {"plain", "held_out_words", "held_out_subjects", "neutral", "unrelated"} == set(sets.prompts)
        for near in sets.near_miss.values():
            assert near.judge is not None and near.judge.name == "clip_zero_shot"
            assert set(near.judge.settings) <= {"present", "absent", "model"}


@pytest.mark.parametrize(
    ("line", "message"), [("strength = 0.0", "strength is 0.0"), ("guidance_scale = -1.0", "guidance_scale is -1")]
)
def test_the_edit_of_the_twins_is_checked(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"small-fire\.toml.* pairs: {message}"):
        load_concept(write(tmp_path, CONCEPT.replace("[pairs]", f"[pairs]\n{line}")))
