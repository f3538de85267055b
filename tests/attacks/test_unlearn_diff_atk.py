from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hard_prompts import TINY, WORD, Blind, SpellingFamily, attack_concept, target_of, tiny
from PIL import Image
from torch import Tensor

from duo.attacks._tokens import Draft, Vocabulary, free_ids
from duo.attacks.unlearn_diff_atk import UnlearnDiffAtk, to_simplex
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt
from duo.target import AccessError, Target

QUICK = UnlearnDiffAtk(length=1, timesteps=4, iterations=5, learning_rate=0.1)


def attack(
    family: Any,
    concept: Any,
    run: Any,
    settings: UnlearnDiffAtk = QUICK,
    *,
    prompt: str = "",
    seed: int = 0,
    **given: Any,
) -> list[Attempt]:
    """From a neutral prompt, so the goal is one of the attacker's images."""
    target = target_of(family, **{"limit": settings.queries, "original": SpellingFamily(), **given})
    state = settings.prepare(target, attack_concept(concept), run=run)
    return list(settings.search(target, state, prompt, generator=torch.Generator().manual_seed(seed)))


def test_is_an_attack_by_gradients() -> None:
    assert isinstance(QUICK, Attack)
    assert (UnlearnDiffAtk.access, UnlearnDiffAtk.learns_from_images) == (Access.GRADIENT, True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),  # is on it
        ([1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 0.0, -1.0], [1.0, 0.0, 0.0]),
        ([0.9, 0.5, 0.0], [0.7, 0.3, 0.0]),  # less 0.2 each; the last would be negative
        ([-5.0, -5.0, -6.0], [0.5, 0.5, 0.0]),
    ],
)
def test_the_projection_by_hand(row: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(to_simplex(torch.tensor([row])), torch.tensor([expected]))


def test_the_projection_agrees_with_bisection() -> None:
    rows = torch.randn(6, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = rows.amax(1) - 1, rows.amax(1)
    for _ in range(60):
        middle = (low + high) / 2
        above = (rows - middle[:, None]).clamp(min=0).sum(1) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    torch.testing.assert_close(to_simplex(rows), (rows - low[:, None]).clamp(min=0))


def test_the_gradient_is_straight_through_a_one_hot_vector_and_clipped() -> None:
    """Against autograd through the one-hot vectors themselves."""
    family = SpellingFamily()
    target = target_of(family)
    vocabulary = Vocabulary.of(target, free_ids(target))
    chosen = torch.tensor([3, 7])
    u = torch.nn.functional.one_hot(chosen, len(vocabulary.words)).float()  # leaves no choice to be drawn
    draft, x0 = Draft(words=(None, None, "b")), family.latents([Image.new("L", (4, 4))], generator=None)
    gradient, loss = QUICK._gradient(
        target, draft, vocabulary, u, x0, torch.tensor(0.5), torch.Generator().manual_seed(0)
    )
    hard = u.clone().requires_grad_()
    off = torch.cat([hard @ vocabulary.rows, family.row_of("b")]).mean(0) - family.row_of(WORD)[0]
    by_hand = (off @ family.projection).square().mean()
    (expected,) = torch.autograd.grad(by_hand, hard)
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)
    assert expected.abs().max() > 1 > expected.abs().min()
    torch.testing.assert_close(gradient, expected.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_words_are_drawn_by_their_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SpellingFamily()
    target = target_of(family)
    vocabulary = Vocabulary.of(target, free_ids(target))
    u = torch.zeros(1, len(vocabulary.words))
    u[0, 3], u[0, 7] = 0.25, 0.75
    seen: list[str] = []
    inner = Draft.conditioning

    def spy(self: Draft, target: Target, rows: Tensor, *, sent: str) -> Any:
        seen.append(sent)
        assert torch.equal(rows, family.row_of(sent))
        return inner(self, target, rows, sent=sent)

    monkeypatch.setattr(Draft, "conditioning", spy)
    x0 = family.latents([Image.new("L", (4, 4))], generator=None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        QUICK._gradient(target, Draft(words=(None,)), vocabulary, u, x0, torch.tensor(0.5), generator)
    assert set(seen) == {"d", "h"}
    assert 30 <= seen.count("d") <= 70


def test_finds_the_word_that_denoises_best_where_chance_does_not(concept: Any, run: Any) -> None:
    """The goal is an image of the word, so it alone has an error of 0 (with a space of one free word and no prompt)."""
    blind = dataclasses.replace(QUICK, learning_rate=1e-9)
    settings = dataclasses.replace(QUICK, iterations=30)
    found = [attack(SpellingFamily(), concept, run, settings, seed=seed)[0] for seed in range(5)]
    chance = [attack(SpellingFamily(), concept, run, blind, seed=seed)[0] for seed in range(5)]
    assert [one.prompt for one in found] == [WORD] * 5
    assert WORD not in [one.prompt for one in chance]
    assert found[0].record["shown"] == (1.0, 1.0)


def test_goes_through_the_schedule_from_clean_to_noisy_with_all_its_iterations(concept: Any, run: Any) -> None:
    family = Blind()
    attack(family, concept, run, dataclasses.replace(QUICK, batch_size=2))
    assert family.process.times_asked == pytest.approx([f for f in (0.125, 0.375, 0.625, 0.875) for _ in range(5 * 2)])


def test_the_published_schedule_is_a_step_below_that_of_the_code(tiny_sd: Any) -> None:
    times = tiny_sd.process.times((torch.arange(50) + 0.5) / 50)
    assert times.tolist() == list(range(9, 1000, 20))


def test_the_words_keep_what_they_learned_over_timesteps(concept: Any, run: Any) -> None:
    """With one step at each of many times nothing would be found if u started anew."""
    settings = dataclasses.replace(QUICK, timesteps=150, iterations=1)
    (found,) = attack(SpellingFamily(), concept, run, settings)
    assert found.prompt == WORD
    assert found.record["timestep"] > 5


@pytest.mark.parametrize("position", ["prefix", "suffix"])
def test_the_prompt_stands_beside_the_free_words(concept: Any, run: Any, position: Any) -> None:
    settings = dataclasses.replace(QUICK, length=3, position=position)
    (found,) = attack(Blind(), concept, run, settings, prompt="x y z")
    words = found.prompt.split()
    free, own = (words[:3], words[3:]) if position == "prefix" else (words[3:], words[:3])
    assert own == ["x", "y", "z"]
    assert free == found.record["free"]
    long = "a b c d e f g h i j"
    (found,) = attack(Blind(), concept, run, settings, prompt=long)
    kept = found.prompt.split()
    assert len(kept) == 10
    assert (kept[3:] if position == "prefix" else kept[:7]) == list("abcdefg")


def test_stops_at_the_first_success(concept: Any, run: Any) -> None:
    family, settings = SpellingFamily(), dataclasses.replace(QUICK, timesteps=60, iterations=2)
    (found,) = attack(family, concept, run, settings)
    assert family.drawn[-1] == found.prompt == WORD
    assert family.drawn.count(WORD) == 1
    assert len(family.process.times_asked) == 2 * found.record["timestep"] < 2 * 60


def test_without_success_the_surest_is_kept(concept: Any, run: Any) -> None:
    family = Blind()
    settings = dataclasses.replace(QUICK, length=3, timesteps=30, iterations=1, learning_rate=0.02)
    (found,) = attack(family, concept, run, settings, prompt="a b c")
    levels = [family.image_of(prompt).getpixel((0, 0)) for prompt in family.drawn]
    assert len(set(levels)) > 2
    assert found.record["shown"] == (0.0, pytest.approx(max(levels) / 255))
    assert family.image_of(found.prompt).getpixel((0, 0)) == max(levels)


@pytest.mark.parametrize("draws", [1, 3])
def test_asks_for_as_many_images_as_it_says(
    concept: Any, run: Any, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(QUICK, draws=draws)
    assert settings.queries == 4 * draws
    family, turn = Blind(), iter(range(100))
    monkeypatch.setattr(Vocabulary, "texts", lambda self, places: ["abcdefghijklmn"[next(turn) // 2]] * len(places))
    attack(family, concept, run, dataclasses.replace(settings, iterations=1))  # texts is asked twice a timestep
    assert len(family.drawn) == settings.queries
    assert len(set(family.seeds)) == draws, "all prompts of a search with the same seeds"


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_smaller_limit_is_kept_and_the_best_so_far_yielded(concept: Any, run: Any, limit: int) -> None:
    family = Blind()
    settings = dataclasses.replace(QUICK, length=2, timesteps=30, iterations=1)
    (found,) = attack(family, concept, run, settings, limit=limit)
    assert len(family.drawn) == limit
    assert (found.record["shown"] is None) == (limit == 0)
    if limit:
        assert found.prompt in family.drawn


def test_same_generator_same_prompt(concept: Any, run: Any) -> None:
    settings = dataclasses.replace(QUICK, length=4, iterations=1, timesteps=2)
    first, again, other = (attack(Blind(), concept, run, settings, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first[0].prompt != other[0].prompt


def test_what_would_be_refused_is_never_the_attempt(concept: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = SpellingFamily()
    target = target_of(family, original=SpellingFamily())
    state = QUICK.prepare(target, attack_concept(concept), run=run)
    monkeypatch.setattr(Target, "refused", lambda self, prompt: WORD if WORD in prompt.split() else None)
    settings = dataclasses.replace(QUICK, timesteps=30)
    found = list(settings.search(target, state, "", generator=torch.Generator().manual_seed(0)))
    assert WORD not in family.drawn
    assert [WORD in one.prompt.split() for one in found] == [False]
    assert (
        WORD not in Vocabulary.of(target, QUICK.prepare(target, attack_concept(concept), run=run)["vocabulary"]).words
    )
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "all" if prompt else None)
    assert list(settings.search(target, state, "", generator=torch.Generator().manual_seed(0))) == []


def test_nothing_of_the_model_changes(concept: Any, run: Any) -> None:
    family = SpellingFamily()
    table, weight = family.token_embeddings().clone(), family.denoiser.weight.detach().clone()
    attack(family, concept, run)
    assert torch.equal(family.token_embeddings(), table)
    assert torch.equal(family.denoiser.weight, weight)
    assert family.denoiser.weight.grad is None


def test_needs_gradients(concept: Any, run: Any) -> None:
    with pytest.raises(AccessError, match="TEXT access touched latents"):
        attack(SpellingFamily(), concept, run, access=Access.TEXT)


@pytest.mark.parametrize("name", TINY)
def test_runs_on_every_family(request: pytest.FixtureRequest, concept: Any, run: Any, name: str) -> None:
    family = tiny(name, request)
    weights = {key: value.clone() for key, value in family.denoiser.state_dict().items()}
    side = family.generate(["a"], seeds=[0], sampling=target_of(family)._sampling)[0].size
    images = [Image.new("RGB", side, (level, 0, 0)) for level in (100, 150, 200)]
    settings = dataclasses.replace(QUICK, length=2, timesteps=2, iterations=1)
    concept = dataclasses.replace(concept, attack_images=images)
    (found,), (again,) = (attack(family, concept, run, settings, prompt="a red house", original=None) for _ in range(2))
    assert found == again
    assert found.prompt.split()[2:] == ["a", "red", "house"]
    assert all(torch.equal(value, weights[key]) for key, value in family.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in family.denoiser.parameters())


def test_a_length_that_the_model_cannot_read_is_refused(concept: Any, run: Any) -> None:
    with pytest.raises(UserError, match="unlearn_diff_atk: length is 11, but the model reads at most 10 tokens"):
        attack(Blind(), concept, run, dataclasses.replace(QUICK, length=11))
    assert attack(Blind(), concept, run, dataclasses.replace(QUICK, length=10))


def test_a_loss_that_is_not_a_number_stops_the_search(concept: Any, run: Any) -> None:
    family = Blind()
    family.projection = torch.full_like(family.projection, torch.nan)
    with pytest.raises(UserError, match="unlearn_diff_atk: the loss is nan at timestep 1; lower learning_rate"):
        attack(family, concept, run)


def test_without_a_detector_it_is_refused(concept: Any, run: Any) -> None:
    with pytest.raises(UserError, match="unlearn_diff_atk: no detector"):
        QUICK.prepare(target_of(Blind()), attack_concept(concept, detector=None), run=run)


def test_says_what_it_costs() -> None:
    published = UnlearnDiffAtk()
    assert published.queries == 50
    assert published.passes(2) == {"denoiser": 4000, "trained": 4000, "text": 4000, "vae": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length", 0),
        ("position", "middle"),
        ("timesteps", 0),
        ("iterations", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("draws", 0),
        ("goal_images", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(QUICK, **{field: value})
