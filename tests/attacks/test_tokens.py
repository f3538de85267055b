from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hard_prompts import TINY, SpellingFamily, target_of, tiny

from duo.attacks._tokens import Draft, Vocabulary, fitted, free_ids, longest, spread
from duo.conditioning import Conditioning
from duo.plugins import Access
from duo.target import AccessError, Target


@pytest.fixture
def spelling() -> SpellingFamily:
    return SpellingFamily()


def ids_of(model: Any, text: str) -> list[int]:
    return model.tokenizer()(text, add_special_tokens=False).input_ids


def words_of(ids: Any, family: Any) -> list[str]:
    return family.tokenizer().convert_ids_to_tokens(ids.tolist())


def test_free_are_the_tokens_that_stand_alone(spelling: SpellingFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = free_ids(target_of(spelling))
    assert words_of(ids, spelling) == [*(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"), "ab</w>"]
    monkeypatch.setattr(Target, "refused", lambda self, prompt: prompt if prompt in ("c", "d") else None)
    assert set(words_of(ids, spelling)) - set(words_of(free_ids(target_of(spelling)), spelling)) == {"c</w>", "d</w>"}


def test_nearest_is_by_cosine_not_by_distance() -> None:
    rows = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    vocabulary = Vocabulary(ids=torch.arange(3), words=("east", "north", "southwest"), rows=rows)
    places = vocabulary.nearest(torch.tensor([[0.3, 0.2], [0.2, 0.3], [-5.0, -4.0]]))
    assert vocabulary.texts(places) == ["east", "north", "southwest"]


@pytest.mark.parametrize(
    ("prompt", "every", "expected"),
    [
        ("a b c d e f g", 3, "* a b c * d e f * g"),  # ⌊7 / 3⌋ + 1
        ("a b c", 3, "* a b c *"),  # ⌊3 / 3⌋ + 1
        ("a b", 3, "* a b"),
        ("", 3, "*"),
        ("a bcd e", 2, "* a * bcd * e"),  # 5 tokens: token 2 lies inside of bcd, token 4 is e
        ("abcdef g", 2, "* * * abcdef * g"),  # ab counts as two letters inside of a word: 6 + 1 tokens
    ],
)
def test_a_free_word_before_every_k_tokens(spelling: SpellingFamily, prompt: str, every: int, expected: str) -> None:
    draft = spread(target_of(spelling), prompt.split(), every=every)
    assert draft.text(["*"] * draft.free) == expected
    assert draft.free == len(spelling.tokenizer()(prompt, add_special_tokens=False).input_ids) // every + 1


def test_a_prompt_too_long_loses_its_last_words(spelling: SpellingFamily) -> None:
    target = target_of(spelling)
    assert longest(target) == 10
    assert fitted(target, "a b c d e", free=lambda tokens: 5) == ["a", "b", "c", "d", "e"]
    assert fitted(target, "a b c d e", free=lambda tokens: 6) == ["a", "b", "c", "d"]
    assert fitted(target, "a b c d e f g h", free=lambda tokens: tokens // 3 + 1) == list("abcdefg")  # 7 + 3
    assert fitted(target, "a b", free=lambda tokens: 10) == []


@pytest.mark.parametrize("name", TINY)
def test_what_is_optimised_is_what_is_sent(request: pytest.FixtureRequest, name: str) -> None:
    """The conditioning of free words among others is that of the prompt as text."""
    model = tiny(name, request)
    target = target_of(model)
    vocabulary = Vocabulary.of(target, free_ids(target))
    assert len(vocabulary.words) > 20
    generator = torch.Generator().manual_seed(0)
    draft = Draft(words=("a", None, None, "red", "house", None))
    for _ in range(5):
        places = torch.randint(len(vocabulary.words), (3,), generator=generator)
        free = vocabulary.texts(places)
        apart = [token for word in draft.text(free).split() for token in ids_of(model, word)]
        assert ids_of(model, draft.text(free)) == apart
        assert ids_of(model, free[0]) == [int(vocabulary.ids[places[0]])]
        with torch.no_grad():
            ours = draft.conditioning(target, vocabulary.rows[places], sent=draft.text(free))
            theirs = target.text([draft.text(free)])
        clip = slice(None, 24) if name == "sd3" else slice(None)  # T5 comes after, which reads the words otherwise
        if name != "flux":
            torch.testing.assert_close(ours.embeds[:, clip], theirs.embeds[:, clip])
        if ours.pooled is not None:
            torch.testing.assert_close(ours.pooled, theirs.pooled)


def test_a_gated_adapter_is_shown_the_prompt_that_is_sent(tiny_sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tiny_sd.text

    def gated(prompts: Sequence[str], **given: Any) -> Conditioning:  # as `duo.gating` wraps it
        return replace(inner(prompts, **given), prompts=tuple(prompts))

    monkeypatch.setattr(tiny_sd, "text", gated)
    target = target_of(tiny_sd)
    vocabulary = Vocabulary.of(target, free_ids(target))
    text = Draft(words=(None, "house")).conditioning(target, vocabulary.rows[:1], sent="red house")
    assert text.prompts == ("red house",)


def test_needs_the_text_encoder(spelling: SpellingFamily) -> None:
    with pytest.raises(AccessError, match="QUERY access touched tokenizer"):
        free_ids(target_of(spelling, access=Access.QUERY))
