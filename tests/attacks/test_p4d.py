from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hard_prompts import TINY, WORD, Blind, SpellingFamily, attack_concept, target_of, tiny
from PIL import Image

from duo.attacks import p4d
from duo.attacks._goal import Goal
from duo.attacks._tokens import Draft, Vocabulary, free_ids
from duo.attacks.p4d import P4d
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt
from duo.target import AccessError, Target

QUICK = P4d(steps=12, evaluate_every=4, keep_by="detector", length=1, goal_images=1)
N, K = (dataclasses.replace(QUICK, variants=(variant,)) for variant in "NK")


def attack(
    family: Any, concept: Any, run: Any, settings: P4d, *, prompt: str = "a c", seed: int = 0, **given: Any
) -> list[Attempt]:
    target = target_of(family, **{"limit": settings.queries, **given})
    state = settings.prepare(target, attack_concept(concept), run=run)
    return list(settings.search(target, state, prompt, generator=torch.Generator().manual_seed(seed)))


def search_of(family: Any, settings: P4d = QUICK) -> p4d._Search:
    target = target_of(family)
    goal = Goal(image=Image.new("L", (4, 4), 255), prompt=WORD, own=True)
    x0 = family.latents([goal.image], generator=None)
    vocabulary = Vocabulary.of(target, free_ids(target))
    return p4d._Search(attack=settings, target=target, vocabulary=vocabulary, goal=goal, x0=x0)


def test_is_an_attack_by_gradients_with_the_model_from_before() -> None:
    assert isinstance(QUICK, Attack)
    assert (P4d.access, P4d.uses_undefended, P4d.learns_from_images) == (Access.GRADIENT, True, True)


def test_the_gradient_is_that_of_the_nearest_words() -> None:
    """The objective is here the mean over 8 elements of ((mean of the words' rows − the goal's) @ projection)². Its
    gradient is worked out by hand; where exactly the embeddings are does not matter while the nearest words stay."""
    family = SpellingFamily()
    search = search_of(family)
    words = family.row_of("a b")
    ((x_t, t, wanted),) = search._wanted(1, torch.Generator().manual_seed(0))
    off = (words.mean(0) - family.row_of(WORD)[0]) @ family.projection
    by_hand = (family.projection @ off * 2 / 8 / 2).expand(2, -1)
    for moved in (words, words * 3, words + 0.05):
        gradient, loss = search._gradient(Draft(words=(None, None)), moved, x_t, t, wanted)
        torch.testing.assert_close(gradient, by_hand)
        assert loss == pytest.approx(float(off.square().mean()))


def test_wants_what_the_undefended_model_predicts_for_the_goals_prompt() -> None:
    family, original = Blind(), SpellingFamily()
    original.projection = 2 * original.projection
    search = search_of(family, dataclasses.replace(QUICK, batch_size=3))
    search = dataclasses.replace(search, target=target_of(family, original=original))
    blocks = list(search._wanted(4, torch.Generator().manual_seed(0)))
    assert [x_t.shape for x_t, _, _ in blocks] == [(3, 2, 2, 2)] * 4
    for x_t, t, wanted in blocks:
        torch.testing.assert_close(
            wanted, original.predict(x_t, t, original.text([WORD]).expand(3)), rtol=1e-5, atol=1e-5
        )
    times = torch.cat([t for _, t, _ in blocks])
    assert times.unique().numel() == 12


def test_finds_the_word_that_predicts_alike_where_chance_does_not(concept: Any, run: Any) -> None:
    """The goal's prompt is the word alone, so it is the one word with an error of 0."""
    settings = dataclasses.replace(N, steps=60, evaluate_every=20)
    blind = dataclasses.replace(settings, learning_rate=1e-9, steps=3, evaluate_every=1)
    found = [attack(SpellingFamily(), concept, run, settings, prompt=WORD, seed=seed)[0] for seed in range(8)]
    chance = [attack(SpellingFamily(), concept, run, blind, prompt=WORD, seed=seed)[0] for seed in range(8)]
    assert sum(one.prompt == WORD for one in found) >= 6
    assert sum(one.prompt == WORD for one in chance) <= 2


def test_k_keeps_the_prompt_and_n_does_not(concept: Any, run: Any) -> None:
    both = dataclasses.replace(QUICK, length=5, every=2)
    n, k = attack(Blind(), concept, run, both, prompt="a b c d e")
    assert (n.variant, k.variant) == ("N", "K")
    assert len(n.prompt.split()) == 5
    words = k.prompt.split()
    assert [words[i] for i in (1, 2, 4, 5, 7)] == ["a", "b", "c", "d", "e"]
    assert k.record["free"] == [words[i] for i in (0, 3, 6)]


@pytest.mark.parametrize(("variants", "draws", "drawn"), [(("N", "K"), 1, 8), (("K",), 1, 4), (("N",), 3, 12)])
def test_asks_for_as_many_images_as_it_says(
    concept: Any, run: Any, variants: Any, draws: int, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 steps are 4 evaluations. No prompt comes up twice here, as the words are made to change."""
    settings = dataclasses.replace(QUICK, steps=10, evaluate_every=3, variants=variants, draws=draws, length=4)
    assert settings.queries == drawn
    family = Blind()
    turn = iter(range(1000))
    monkeypatch.setattr(Vocabulary, "nearest", lambda self, rows: torch.full((len(rows),), next(turn) % 27))
    attack(family, concept, run, settings, original=SpellingFamily())
    assert len(family.drawn) == drawn
    assert len(set(family.seeds)) == draws * len(variants), "all prompts of a search with the same seeds"


def test_no_prompt_is_drawn_twice(concept: Any, run: Any) -> None:
    family = Blind()
    attack(family, concept, run, dataclasses.replace(N, learning_rate=1e-9), original=SpellingFamily())
    assert len(family.drawn) == 1


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_smaller_limit_is_kept_and_the_best_so_far_yielded(concept: Any, run: Any, limit: int) -> None:
    family = Blind()
    settings = dataclasses.replace(N, length=3, evaluate_every=1, learning_rate=1.0)
    (found,) = attack(family, concept, run, settings, original=SpellingFamily(), limit=limit)
    assert len(family.drawn) == limit
    assert (found.record["kept"] is None) == (limit == 0)
    if limit:
        assert found.prompt in family.drawn


def test_keeps_what_the_detector_is_surest_of(concept: Any, run: Any) -> None:
    family = Blind()
    settings = dataclasses.replace(N, length=2, steps=20, evaluate_every=1, learning_rate=1.0)
    (found,) = attack(family, concept, run, settings, original=SpellingFamily())
    levels = [family.image_of(prompt).getpixel((0, 0)) for prompt in family.drawn]
    assert len(set(levels)) > 2
    assert found.record["kept"] == pytest.approx(max(levels) / 255)
    assert family.image_of(found.prompt).getpixel((0, 0)) == max(levels)


def test_keeps_what_is_most_similar_to_the_goal(concept: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for CLIP to which dark images are near to the goal."""

    class Towers:
        def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
            levels = torch.tensor([image.convert("L").getpixel((0, 0)) / 255 for image in images])
            angles = torch.where(levels > 0.9, torch.zeros(()), levels)
            return torch.stack([angles.cos(), angles.sin()], dim=1)

    asked: list[str] = []
    monkeypatch.setattr(p4d, "load_clip", lambda source, device: asked.append(source) or Towers())
    family = Blind()
    settings = dataclasses.replace(N, keep_by="similarity", clip="any", length=2, steps=20, evaluate_every=1)
    settings = dataclasses.replace(settings, learning_rate=1.0)
    (found,) = attack(family, concept, run, settings, prompt=WORD, original=SpellingFamily())
    levels = [family.image_of(prompt).getpixel((0, 0)) / 255 for prompt in family.drawn]
    assert set(asked) == {"any"}
    assert found.record["kept"] == pytest.approx(float(torch.tensor(min(levels)).cos()))


def test_the_embedded_clip_tells_images_apart(toybox_pair: tuple[Image.Image, Image.Image]) -> None:
    search = search_of(SpellingFamily(), dataclasses.replace(QUICK, keep_by="similarity", clip="toybox"))
    one, other = toybox_pair
    search = dataclasses.replace(search, goal=Goal(image=one, prompt="", own=True))
    assert search._kept([one]) == pytest.approx(1)
    assert search._kept([other]) < 0.99
    assert search._kept([one, other]) == pytest.approx((1 + search._kept([other])) / 2)


@pytest.fixture
def toybox_pair() -> tuple[Image.Image, Image.Image]:
    return Image.new("RGB", (64, 64), (200, 30, 10)), Image.new("RGB", (64, 64), (10, 200, 30))


def test_may_stop_at_the_first_prompt_that_shows_the_concept(concept: Any, run: Any) -> None:
    whole = dataclasses.replace(K, steps=40, evaluate_every=1)
    short = dataclasses.replace(whole, stop_when_found=True)
    families = SpellingFamily(), SpellingFamily()
    kept, first = (
        attack(family, concept, run, one, prompt=f"a {WORD}")[0]
        for family, one in zip(families, (whole, short), strict=True)
    )
    assert kept.record["kept"] == first.record["kept"] == 2  # the prompt has the word, whatever is put before it
    assert len(families[1].drawn) - 1 == 1 < len(families[0].drawn) - 1  # one more is the goal


def test_same_generator_same_prompts(concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, length=4)
    first, again, other = (
        attack(Blind(), concept, run, settings, seed=seed, original=SpellingFamily()) for seed in (4, 4, 5)
    )
    assert first == again
    assert [one.prompt for one in first] != [one.prompt for one in other]


def test_what_would_be_refused_is_never_the_attempt(concept: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(N, steps=60, evaluate_every=1)
    (found,) = attack(SpellingFamily(), concept, run, settings, prompt=WORD)
    assert found.prompt == WORD
    refused = lambda self, prompt: "it" if WORD in prompt.split() else None  # noqa: E731
    family, original = SpellingFamily(), SpellingFamily()
    target = target_of(family, original=original, limit=settings.queries)
    state = settings.prepare(target, attack_concept(concept), run=run)
    monkeypatch.setattr(Target, "refused", refused)
    (found,) = settings.search(target, state, "a", generator=torch.Generator().manual_seed(0))
    assert found.prompt != WORD
    assert WORD not in family.drawn
    monkeypatch.setattr(Target, "refused", lambda self, prompt: None if prompt == "a c" else "all")
    assert list(settings.search(target, state, "a c", generator=torch.Generator().manual_seed(0))) == []


def test_nothing_of_the_model_changes(concept: Any, run: Any) -> None:
    family = SpellingFamily()
    table, weight = family.token_embeddings().clone(), family.denoiser.weight.detach().clone()
    attack(family, concept, run, QUICK)
    assert torch.equal(family.token_embeddings(), table)
    assert torch.equal(family.denoiser.weight, weight)
    assert family.denoiser.weight.grad is None


def test_needs_gradients_and_the_undefended_model(concept: Any, run: Any) -> None:
    with pytest.raises(AccessError, match="TEXT access touched latents"):
        attack(SpellingFamily(), concept, run, QUICK, access=Access.TEXT)


@pytest.mark.parametrize("name", TINY)
def test_runs_on_every_family(request: pytest.FixtureRequest, concept: Any, run: Any, name: str) -> None:
    family = tiny(name, request)
    weights = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    side = family.generate(["a"], seeds=[0], sampling=target_of(family)._sampling)[0].size
    images = [Image.new("RGB", side, (level, 0, 0)) for level in (100, 150, 200)]
    settings = dataclasses.replace(QUICK, length=3, steps=2, evaluate_every=2)
    concept = dataclasses.replace(concept, attack_images=images)
    found, again = (attack(family, concept, run, settings, prompt="a red house") for _ in range(2))
    assert found == again
    assert [one.variant for one in found] == ["N", "K"]
    assert {"a", "red", "house"} <= set(found[1].prompt.split())
    assert all(torch.equal(value, weights[key]) for key, value in family.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in family.denoiser.parameters())


def test_a_length_that_the_model_cannot_read_is_refused(concept: Any, run: Any) -> None:
    with pytest.raises(UserError, match="p4d: length is 11, but the model reads at most 10 tokens"):
        attack(SpellingFamily(), concept, run, dataclasses.replace(N, length=11))
    assert attack(SpellingFamily(), concept, run, dataclasses.replace(N, length=10))


def test_a_loss_that_is_not_a_number_stops_the_search(concept: Any, run: Any) -> None:
    family = Blind()
    family.projection = torch.full_like(family.projection, torch.nan)
    with pytest.raises(UserError, match="p4d: the loss is nan after step 0; lower learning_rate"):
        attack(family, concept, run, N, original=SpellingFamily())


def test_without_a_detector_it_is_refused(concept: Any, run: Any) -> None:
    with pytest.raises(UserError, match="p4d: no detector"):
        QUICK.prepare(target_of(Blind()), attack_concept(concept, detector=None), run=run)


def test_says_what_it_costs() -> None:
    published = P4d()
    assert published.queries == 2 * 60
    assert published.passes(3) == {"denoiser": 36000, "trained": 18000, "text": 18000, "vae": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variants", ()),
        ("variants", ("N", "N")),
        ("length", 0),
        ("every", 0),
        ("steps", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("evaluate_every", 0),
        ("draws", 0),
        ("keep_by", "luck"),
        ("goal_images", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(QUICK, **{field: value})
