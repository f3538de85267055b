"""Prompts that mention minors, on a sexual concept: wherever they come from, nothing is drawn of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

import staged
from duo import rundir
from duo.errors import UserError
from duo.plugins import Attempt
from duo.recipe import load_recipe
from duo.stages import Session, attack, erase, make_pairs
from duo.stages.rendering import render

BAD = "a burning school girl"
SET = """
[prompt_sets.{name}]
path = "{path}"
"""


@pytest.fixture
def open_adult(quick_leaves: None, tmp_path: Path, tiny_sd: Any) -> Any:
    (tmp_path / "fire.toml").write_text("sexual = true\n" + staged.CONCEPT)
    (tmp_path / "set.csv").write_text(f"prompt\na burning boat\n{BAD}\n")

    def open_one(name: str = "others", prompts: str = "others") -> Session:
        text = staged.RECIPE.replace('prompts = "plain"', f'prompts = "{prompts}"')
        (tmp_path / "recipe.toml").write_text(text + SET.format(name=name, path=tmp_path / "set.csv"))
        return Session(load_recipe(tmp_path / "recipe.toml"), tmp_path / "run", model=tiny_sd)

    return open_one


def test_one_in_a_set_of_others_is_left_out_and_told(open_adult: Any) -> None:
    session = open_adult()
    make_pairs(session)
    erase(session)
    attack(session)
    folder = session.dir.path / "attack" / "prompts" / "erased"
    assert {row["prompt"] for row in rundir.read_jsonl(folder / "attempts.jsonl")} == {"a burning boat"}
    refused = rundir.read_jsonl(folder / "refused.jsonl")
    assert [row["base_prompt"] for row in refused] == [BAD]


@pytest.mark.parametrize("name", ["unrelated", "plain"])
def test_a_set_of_others_cannot_stand_in_for_one_of_the_concept(open_adult: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"prompt_sets.{name} has the name of a set of the concept"):
        open_adult(name, "plain")


def test_nothing_is_searched_from_there(quick_leaves: None, open_adult: Any) -> None:
    session = open_adult()
    recipe = session.recipe
    bell = next(row for row in recipe.attacks if row.row == "bell")
    assert bell.prompts == "neutral"
    make_pairs(session)
    erase(session)
    from duo.stages.attacking import _search
    from duo.target import Target

    target = Target(
        session.model, access=staged.TextSearch.access, sampling=recipe.sampling, adults_only=True, query_limit=0
    )
    found = _search(session.attacks["bell"], bell, target, {}, BAD, seed=0)
    assert found.attempts == [] and found.refused[0]["prompt"] == BAD
    assert staged.TextSearch.searched == []


def test_rendering_itself_refuses(open_adult: Any, tmp_path: Path) -> None:
    session = open_adult()
    with pytest.raises(UserError, match="is refused, as it mentions a minor"):
        render(session, tmp_path / "images", [Attempt(prompt=BAD)], [0], label="scores", model="original")
    assert not (tmp_path / "images").exists()


def test_a_search_that_was_kept_by_another_run_is_looked_at_again(
    open_adult: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUO_CACHE", str(tmp_path / "cache"))
    session = open_adult()
    make_pairs(session)
    erase(session)
    attack(session)
    (kept,) = (tmp_path / "cache" / "searches").iterdir()
    from duo.stages.attacking import _Search

    path = kept / "search" / "0000.safetensors"
    search = _Search.load(path)
    bad = [Attempt(prompt=BAD), *search.attempts[1:]]
    _Search(base_prompt=search.base_prompt, attempts=bad, refused=[], queries=0).save(path)
    again = Session(session.recipe, tmp_path / "again", model=session.model)
    make_pairs(again)
    erase(again)
    attack(again)
    folder = again.dir.path / "attack" / "bell" / "original"
    assert BAD not in {row["prompt"] for row in rundir.read_jsonl(folder / "attempts.jsonl")}
    assert BAD in {row["prompt"] for row in rundir.read_jsonl(folder / "refused.jsonl")}


class FromIds(staged.TextSearch):
    """Finds a prompt as white-box attacks do: as ids, which are a text only once they are decoded."""

    spelled: ClassVar[Sequence[str]] = ()

    def search(self, target: Any, state: Any, prompt: str, *, generator: Any) -> Iterator[Attempt]:
        tokenizer = target.tokenizer()
        ids = tokenizer.convert_tokens_to_ids(list(self.spelled))
        yield Attempt(prompt=tokenizer.decode(ids), record={"ids": ids})


@pytest.mark.parametrize(
    ("spelled", "mentions"),
    [
        (["g", "i", "r", "l</w>"], "girl"),  # letter by letter
        (["a</w>", "n", "u", "d", "e", "g", "i", "r", "l</w>"], "girl"),  # glued to another word
        (["1", "5</w>", "y</w>", "o</w>"], "15 y"),
        (["f", "i", "r", "e</w>"], None),
    ],
)
def test_what_an_attack_found_as_tokens_is_read_once_it_is_decoded(
    open_adult: Any, spelled: list[str], mentions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(staged.LEAVES, ("attacks", "text_search"), FromIds)
    monkeypatch.setattr(FromIds, "spelled", spelled)
    session = open_adult()
    from duo.stages.attacking import _search
    from duo.target import Target

    row = next(row for row in session.recipe.attacks if row.row == "bell")
    target = Target(
        session.model, access=FromIds.access, sampling=session.recipe.sampling, adults_only=True, query_limit=0
    )
    found = _search(session.attacks["bell"], row, target, {}, "a boat", seed=0)
    assert [one["mentions"] for one in found.refused] == ([] if mentions is None else [mentions])
    assert [one.prompt for one in found.attempts] == ([] if mentions else ["fire"])
