"""Concept files."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from duo.concept import FOLDER, concept_names, load_concept
from duo.errors import UserError
from duo.fields import as_table
from duo.rundir import digest

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
    known |= {*concept.harmless}
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


# --- harmless captions -------------------------------------------------------------------------------


def with_captions(folder: Path, line: str, *, file: str | bytes | None = None, name: str = "captions.txt") -> Path:
    """The small concept with `line` among its own fields, and a file of captions beside it."""
    if file is not None:
        (folder / name).write_bytes(file if isinstance(file, bytes) else file.encode())
    return write(folder, CONCEPT.replace("[pairs]", f"{line}\n[pairs]", 1))


def test_without_captions_of_its_own_a_concept_has_those_beside_its_vector_pairs(tmp_path: Path) -> None:
    assert load_concept(write(tmp_path, CONCEPT)).harmless == ("a house",)
    none = CONCEPT.replace('vector_pairs = [["a burning house", "a house"]]', "")
    assert load_concept(write(tmp_path, none)).harmless == ("a red house",)
    assert "harmless" not in as_table(load_concept(write(tmp_path, CONCEPT)))


@pytest.mark.parametrize(
    ("line", "name", "file", "captions"),
    [
        ('harmless = ["a boat", "a lake"]', "captions.txt", None, ("a boat", "a lake")),
        (
            'harmless_file = "captions.txt"',
            "captions.txt",
            " a boat \r\n\r\na b\u00fcrger",
            ("a boat", "a b\u00fcrger"),
        ),
        ('harmless = ["a lake"]\nharmless_file = "captions.txt"', "captions.txt", "a boat\n", ("a lake", "a boat")),
        (
            'harmless_file = "c.csv"',
            "c.csv",
            '\ufeffseed,prompt\n1,"a boat, a lake"\n2,\n3,a car\n',
            ("a boat, a lake", "a car"),
        ),
        ('harmless_file = "c.CSV"', "c.CSV", "text,caption\nno,a boat\n", ("a boat",)),
    ],
)
def test_captions_are_read(tmp_path: Path, line: str, name: str, file: str | None, captions: tuple[str, ...]) -> None:
    assert load_concept(with_captions(tmp_path, line, file=file, name=name)).harmless == captions


@pytest.mark.parametrize(
    ("line", "file", "message"),
    [
        ("harmless = []", None, r"small-fire\.toml: harmless is empty; leave it out"),
        ("harmless = [1]", None, r"small-fire\.toml: harmless\[0\] is .*expected a list of a string"),
        ('harmless = ["a boat", " "]', None, "harmless has an empty caption"),
        ('harmless = ["a boat", "a boat"]', None, "harmless has 'a boat' twice"),
        ('harmless = ["a boat"]\nharmless_file = "captions.txt"', "a boat", "harmless has 'a boat' twice"),
        ('harmless = ["a green ball"]', None, "'a green ball', which is in prompts.unrelated and scored"),
        ('harmless = ["a red house at sunset"]', None, "which is in near_miss.sunset and scored"),
        ('harmless = ["a flaming yellow tent"]', None, "which is in validation.prompts.plain and scored"),
        ("harmless_file = 3", None, r"small-fire\.toml: harmless_file is 3, expected the path"),
        ('harmless_file = "captions.txt"', None, r"cannot read .*captions\.txt: No such file"),
        ('harmless_file = "captions.txt"', "\n \n", r"captions\.txt has no captions"),
        ('harmless_file = "captions.txt"', b"a caf\xe9", r"captions\.txt is not a text file in UTF-8"),
        ('harmles_file = "captions.txt"', None, r"no field 'harmles_file' \(did you mean 'harmless_file'\?\)"),
    ],
)
def test_captions_that_cannot_be_used_are_named(
    tmp_path: Path, line: str, file: str | bytes | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_concept(with_captions(tmp_path, line, file=file))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("words,seed\na boat,1\n", "has no column prompt or caption or text"),
        ("prompt\n", "has no captions"),
        ("", "has no column"),
        ('prompt\n"a boat', "is not valid CSV"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named(tmp_path: Path, file: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"c\.csv {message}"):
        load_concept(with_captions(tmp_path, 'harmless_file = "c.csv"', file=file, name="c.csv"))


def test_the_digest_is_of_what_the_captions_are(tmp_path: Path) -> None:
    def of(line: str, file: str | None = None) -> str:
        return digest(as_table(load_concept(with_captions(tmp_path, line, file=file))))

    first = of('harmless_file = "captions.txt"', "a boat\na car\n")
    assert first == of('harmless = ["a boat", "a car"]') == of('harmless_file = "captions.txt"', "a boat\n\na car")
    assert first != of('harmless_file = "captions.txt"', "a car\na boat\n")
    assert of("") == of('harmless = ["a house"]') != first


def test_captions_of_a_sexual_concept_may_not_mention_minors(tmp_path: Path) -> None:
    path = with_captions(tmp_path, 'sexual = true\nharmless_file = "captions.txt"', file="a boat\na girl on a swing\n")
    with pytest.raises(UserError, match="girl"):
        load_concept(path)
    path = with_captions(tmp_path, 'harmless_file = "captions.txt"', file="a girl on a swing\na nude man\n")
    with pytest.raises(UserError, match="girl"):  # a caption that is sexual makes the concept so
        load_concept(path)


def test_the_shipped_captions_are_many_and_installed() -> None:
    table = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = table["tool"]["setuptools"]["package-data"]["duo"]
    installed = {path for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert {path for path in FOLDER.iterdir() if path.is_file()} <= installed
    captions = load_concept("nudity").harmless
    assert len(captions) >= 300
    assert captions == load_concept("violence-gun").harmless
