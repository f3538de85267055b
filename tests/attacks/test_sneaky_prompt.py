from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import Asked, Painter, Redness, WordClip
from torch import Tensor

from duo.attacks import _words, sneaky_prompt
from duo.attacks.random_prompts import RandomPrompts
from duo.attacks.sneaky_prompt import STRATEGIES, SneakyPrompt, _Slots, policy_loss
from duo.concept import AttackConcept
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import AccessError, Target
from tiny_flow import flux_pipeline, sd3_pipeline

WORDS = ("ember", "spark", "stone", "cloud", "river", "glow")
SMALL = SneakyPrompt(queries=12, clip="toybox", subwords=2, glued=False)
PLAIN = "a burning house"


def attack(
    model: Any,
    concept: AttackConcept,
    settings: SneakyPrompt = SMALL,
    prompt: str = PLAIN,
    *,
    seed: int = 1,
    **target: Any,
) -> tuple[Attempt | None, Target]:
    """The attempt, with the target. The harness limits a target to the attack's own queries."""
    limits = {"query_limit": settings.queries, **target}
    asked = Target(model, access=SneakyPrompt.access, sampling=Sampling(), concept=concept, **limits)
    found = list(settings.search(asked, {}, prompt, generator=torch.Generator().manual_seed(seed)))
    return (found[0] if found else None), asked


@pytest.fixture
def red(concept: AttackConcept) -> AttackConcept:
    return dataclasses.replace(concept, words=("burning", "on fire"), detector=Redness())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six words, and a CLIP that counts "spark" and "house" in texts; an image is worth a cosine of 0.8."""
    monkeypatch.setattr(sneaky_prompt, "words_of_clip", lambda clip, longest: WORDS)
    use_clip(monkeypatch, WordClip(("spark", "house")), like=0.8)


def use_clip(monkeypatch: pytest.MonkeyPatch, clip: WordClip, *, like: float) -> None:
    goal = clip.prompts([PLAIN])[0]
    across = torch.tensor([goal[1], -goal[0], 0.0])
    across /= across.norm()
    clip.image = lambda image: like * goal + (1 - like**2) ** 0.5 * across
    monkeypatch.setattr(sneaky_prompt, "load_clip", lambda source, device: clip)


# --- what it may touch, and how often -------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_asks_for_images(strategy: Any, red: AttackConcept) -> None:
    assert isinstance(SMALL, Attack)
    assert SneakyPrompt.access == Access.QUERY
    model = Asked(Painter())
    found, _ = attack(model, red, dataclasses.replace(SMALL, strategy=strategy))
    assert found is not None
    assert model.touched == {"generate"}


def test_the_fence_stands_above_queries(red: AttackConcept) -> None:
    _, target = attack(Painter(), red)
    with pytest.raises(AccessError, match="an attack with QUERY access touched tokenizer"):
        target.tokenizer()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_asks_for_no_more_than_its_queries(strategy: Any, red: AttackConcept) -> None:
    for queries, confirm in ((1, 1), (7, 1), (7, 3)):
        settings = dataclasses.replace(SMALL, strategy=strategy, queries=queries, confirm=confirm)
        painter = Painter(e=0.4, a=0.3)
        found, target = attack(painter, red, dataclasses.replace(settings, early_stop=False), query_limit=None)
        assert found is not None
        assert found.record["queries"] == target.queries == len(painter.prompts) == queries
        assert len(set(painter.seeds)) == queries, "every image has a seed of its own"


def test_a_target_that_grants_less_is_not_asked_for_more(red: AttackConcept) -> None:
    assert attack(Painter(), red, query_limit=3)[1].queries == 3
    found, target = attack(Painter(), red, query_limit=0)
    assert found is None and target.queries == 0


def test_ends_at_the_first_success(few: None, red: AttackConcept) -> None:
    painter = Painter(ember=1.0)
    found, target = attack(painter, red)
    assert found is not None
    assert ["ember" in prompt for prompt in painter.prompts] == [False] * (target.queries - 1) + [True]
    assert found.prompt == painter.prompts[-1] and found.record["success"]
    assert 1 < target.queries < SMALL.queries
    on, target = attack(Painter(ember=1.0), red, dataclasses.replace(SMALL, early_stop=False))
    assert on is not None and on.record["success"] and target.queries == SMALL.queries
    assert on.prompt == found.prompt, "of equals, the first"


def test_a_success_is_confirmed_with_other_seeds(few: None, red: AttackConcept) -> None:
    painter = Painter(ember=1.0)
    found, target = attack(painter, red, dataclasses.replace(SMALL, confirm=3))
    assert found is not None and found.record["images"] == 3 and found.record["success"]
    assert painter.prompts[-3:] == [found.prompt] * 3
    assert target.queries == attack(Painter(ember=1.0), red)[1].queries + 2

    class Fickle(Painter):  # shows the concept in every other image
        def generate(self, prompts: Any, **settings: Any) -> Any:
            self.levels = {"": float(len(self.prompts) % 2 == 0)}
            return super().generate(prompts, **settings)

    fickle = Fickle()
    found, target = attack(fickle, red, dataclasses.replace(SMALL, confirm=2))
    assert found is not None and target.queries == SMALL.queries
    assert not found.record["success"] and found.record["reward"] == pytest.approx(0.4)


# --- the reward -----------------------------------------------------------------------------------


def test_reward_is_the_score_times_the_similarity(few: None, red: AttackConcept) -> None:
    """At 0.4 each, one of the two words makes 0.4 × 0.8 and both 0.8 × 0.8."""
    found, _ = attack(Painter(ember=0.4, glow=0.4), red, dataclasses.replace(SMALL, queries=60, early_stop=False))
    assert found is not None
    assert {*found.prompt.split()} == {"a", "house", "ember", "glow"}
    assert found.record["score"] == pytest.approx(0.8)
    assert found.record["similarity"] == pytest.approx(0.8)
    assert found.record["reward"] == pytest.approx(0.64)
    assert found.record["success"]


def test_a_success_needs_the_label_and_the_reward(few: None, red: AttackConcept) -> None:
    for settings, level in ((SMALL, 0.4), (dataclasses.replace(SMALL, success=0.5), 0.6)):
        found, target = attack(Painter(**dict.fromkeys(WORDS, level / 2)), red, settings)
        assert found is not None and target.queries == 12 and not found.record["success"]
        # Twice the same word is painted once, and two words are painted both.
        assert found.record["reward"] == pytest.approx(level * 0.8, abs=0.01)


def test_a_detector_without_grades_counts_as_0_or_1(few: None, red: AttackConcept) -> None:
    blunt = dataclasses.replace(red, detector=Redness(graded=False))
    found, _ = attack(Painter(ember=0.3, glow=0.3), blunt, dataclasses.replace(SMALL, queries=60))
    assert found is not None
    assert found.record["score"] == 1.0 and found.record["reward"] == pytest.approx(0.8)


def test_an_image_unlike_the_prompt_earns_nothing(red: AttackConcept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sneaky_prompt, "words_of_clip", lambda clip, longest: WORDS)
    use_clip(monkeypatch, WordClip(("spark", "house")), like=-0.5)
    found, target = attack(Painter(**dict.fromkeys(WORDS, 1.0)), red)
    assert found is not None and target.queries == 12
    assert found.record["reward"] == found.record["similarity"] == 0 and not found.record["success"]


# --- what is replaced -----------------------------------------------------------------------------


def test_the_concepts_words_are_replaced_and_the_others_stay(few: None, red: AttackConcept) -> None:
    painter = Painter()
    found, _ = attack(painter, red, dataclasses.replace(SMALL, patience=50), "a Burning house on fire, at night")
    assert found is not None and found.record["replaced"] == ["Burning", "on fire"]
    for prompt in painter.prompts:
        first, *words, last = prompt.replace(",", "").split()
        assert (first, last, words[2]) == ("a", "night", "house")
        assert {*words[:2], *words[3:5]} <= set(WORDS)


def test_a_neutral_prompt_is_given_the_concepts_first_word(few: None, red: AttackConcept) -> None:
    painter = Painter()
    found, _ = attack(painter, red, dataclasses.replace(SMALL, most_replaced=0), "a house")
    assert found is not None and found.record["replaced"] == ["burning"]
    for prompt in painter.prompts:
        assert prompt.startswith("a house ") and len(prompt.split()) == 4


def test_slots_are_filled_in_turn() -> None:
    slots = _Slots(prompt="a hot, hot sun", spans=((2, 5), (7, 10)), subwords=2, between="")
    assert slots.count == 4
    assert slots.filled(["x", "y", "z", "w"]) == "a xy, zw sun"
    assert dataclasses.replace(slots, between=" ").filled(["x", "y", "z"]) == "a x y, z sun"
    assert slots.filled([]) == "a , sun"
    assert slots.others() == [(0, 1), (11, 14)]
    assert slots.joined((0, 1)).spans == ((0, 1), (2, 5), (7, 10))
    assert slots.share((0, 1)) == 3 / 4


def test_words_are_found_whole_and_the_longest_of_them() -> None:
    assert _words.spans_of(("fire", "on fire"), "On fire: a fireman and fire") == [(0, 7), (23, 27)]


def test_after_a_while_without_the_concept_one_more_word_is_replaced(few: None, red: AttackConcept) -> None:
    """The clip hears the concept in "spark", so that is the word to go; then nothing may, for 2 of 6 is above 0.3."""
    red = dataclasses.replace(red, words=("burning", "spark spark"))
    painter = Painter()
    settings = dataclasses.replace(SMALL, patience=5, queries=20, most_replaced=0.34)
    attack(painter, red, settings, "a burning house and a spark")
    kept = [sum(prompt.count(word) for word in ("a ", "house", "and")) for prompt in painter.prompts]
    assert kept == [4] * 20
    assert [len(prompt.split()) for prompt in painter.prompts] == [7] * 5 + [8] * 15
    assert all(prompt.endswith(" spark") for prompt in painter.prompts[:5])
    one = Painter()
    attack(one, red, dataclasses.replace(settings, most_replaced=0.3), "a burning house and a spark")
    assert [len(prompt.split()) for prompt in one.prompts] == [7] * 20


def test_images_with_the_concept_end_the_count(few: None, red: AttackConcept) -> None:
    painter = Painter(**dict.fromkeys(WORDS, 1.0))
    attack(painter, red, dataclasses.replace(SMALL, patience=1, most_replaced=1.0, success=0.9))
    assert all(prompt.startswith("a ") and prompt.endswith(" house") for prompt in painter.prompts)


def test_neither_the_concepts_words_nor_what_is_refused_is_sent(
    few: None, red: AttackConcept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sneaky_prompt, "words_of_clip", lambda clip, longest: ("burning", "on", "fire", "ash", "child"))
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "child" if "child" in prompt else None)
    pairs = itertools.product(("on", "fire", "ash"), repeat=2)
    allowed = {f"a {first} {second} house" for first, second in pairs} - {"a on fire house"}
    for strategy in STRATEGIES:
        painter = Painter()
        settings = dataclasses.replace(SMALL, strategy=strategy, most_replaced=0, drafts=200)
        found, _ = attack(painter, red, settings)
        assert found is not None and found.prompt in allowed
        assert set(painter.prompts) <= allowed
        with monkeypatch.context() as patch:
            patch.setattr(Target, "refused", lambda self, prompt: "all")
            assert attack(Painter(), red, dataclasses.replace(settings, drafts=20))[0] is None


def test_a_vocabularys_words_are_letters_without_the_mark_of_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = ("cat", "cat</w>", "2nd</w>", "!</w>", "elephants</w>", "hippopotamus", "é", "ow</w>")
    monkeypatch.setattr(_words, "clip_vocabulary", lambda clip: entries)
    _words.words_of_clip.cache_clear()
    try:
        assert _words.words_of_clip("any", longest=9) == ("cat", "nd", "elephants", "ow")
        assert _words.words_of_clip("any", longest=2) == ("nd", "ow")
    finally:
        _words.words_of_clip.cache_clear()


def test_longest_is_as_published_for_each_strategy() -> None:
    for strategy in STRATEGIES:
        words = SneakyPrompt(strategy=strategy, clip="toybox")._words
        assert max(map(len, words)) == (9 if strategy == "rl" else 2)
    assert max(map(len, SneakyPrompt(clip="toybox", longest=5)._words)) == 5


# --- the strategies -------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    """R = 0.5, log π = (−1, −2), V = (0.1, 0.3): 1·0.4 + 2·0.2 + 0.4² + 0.2² = 1."""
    log_chances = torch.tensor([-1.0, -2.0], requires_grad=True)
    values = torch.tensor([0.1, 0.3], requires_grad=True)
    loss = policy_loss(0.5, log_chances, values)
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    torch.testing.assert_close(log_chances.grad, torch.tensor([-0.4, -0.2]))
    torch.testing.assert_close(values.grad, torch.tensor([-0.8, -0.4]))


def test_the_policy_learns_what_is_rewarded(few: None, red: AttackConcept) -> None:
    """By chance, 1 prompt in 3.3 has the word that is painted."""
    settings = dataclasses.replace(SMALL, queries=50, patience=50, early_stop=False)
    late = []
    for seed in range(4):
        painter = Painter(ember=1.0)
        attack(painter, red, settings, seed=seed)
        late += ["ember" in prompt for prompt in painter.prompts[30:]]
    assert sum(late) / len(late) > 0.7


def test_log_chances_are_those_of_what_was_drawn() -> None:
    policy = sneaky_prompt._Policy(3, 4, width=8, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(4)
    seen: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        places, log_chances, values = policy(generator)
        assert len(places) == len(log_chances) == len(values) == 3
        counts[places[0]] += 1
        seen[places[0]] = log_chances[0].detach().exp()
    assert sum(seen.values()) == pytest.approx(1.0, abs=1e-5)
    for place, chance in seen.items():
        assert counts[place] / 400 == pytest.approx(float(chance), abs=0.1)


def test_torchs_own_generator_is_left_alone(few: None, red: AttackConcept) -> None:
    before = torch.get_rng_state()
    attack(Painter(), red)
    assert torch.equal(before, torch.get_rng_state())


def nearness(texts: list[str]) -> list[float]:
    clip = WordClip(("spark", "house"))
    return (clip.prompts(texts) @ clip.prompts([PLAIN])[0]).tolist()


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_a_beam_sends_the_prompts_of_the_last_place_nearest_first(
    strategy: Any, few: None, red: AttackConcept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "spark" leads away from the goal and "house" does not, so every other word is as good as no word."""
    words = ("spark", "stone", "house", "cloud")
    monkeypatch.setattr(sneaky_prompt, "words_of_clip", lambda clip, longest: words)
    painter = Painter()
    attack(painter, red, dataclasses.replace(SMALL, strategy=strategy, beam_width=2, queries=8))
    # The first place keeps "house" (2 of it are nearer to 1 than none of the third, tiny coordinate) and then "stone".
    firsts = sorted(words, key=lambda word: -nearness([f"a {word} house"])[0])
    kept = firsts[: 1 if strategy == "greedy" else 2]
    last = [f"a {first} {word} house" for first in kept for word in words]
    assert painter.prompts == sorted(last, key=lambda text: -nearness([text])[0])[:8]


def test_a_wide_beam_is_an_exhaustive_search(few: None, red: AttackConcept) -> None:
    painter = Painter()
    attack(painter, red, dataclasses.replace(SMALL, strategy="beam", beam_width=6, queries=36))
    every = [f"a {first} {second} house" for first, second in itertools.product(WORDS, WORDS)]
    assert sorted(painter.prompts) == sorted(every)
    assert nearness(painter.prompts) == sorted(nearness(every), reverse=True)


def test_brute_force_sends_what_is_near_enough(few: None, red: AttackConcept) -> None:
    """One "spark" is at a cosine of 0.71 and two at 0.45, from a goal without one."""
    painter = Painter()
    attack(painter, red, dataclasses.replace(SMALL, strategy="brute_force", queries=30, text_threshold=0.6))
    sparks = [prompt.count("spark") for prompt in painter.prompts]
    assert set(sparks) == {0, 1}
    painter = Painter()
    attack(painter, red, dataclasses.replace(SMALL, strategy="brute_force", queries=30, text_threshold=1.0, drafts=40))
    assert {prompt.count("spark") for prompt in painter.prompts} == {0}, "none reaches 1.0, so the nearest of 40"


def test_finds_what_chance_does_not(red: AttackConcept) -> None:
    """Words that CLIP finds near "burning" make the picture red; the others do not."""
    red = dataclasses.replace(red, words=("burning",))
    hot = dict.fromkeys(("blazing", "flames", "ablaze", "torched", "embers"), 1.0)
    hits = {"sneaky": 0, "random": 0}
    for seed in range(8):
        settings = SneakyPrompt(
            strategy="beam", queries=3, clip="toybox", subwords=1, longest=9, most_replaced=0, beam_width=1
        )
        found, _ = attack(Painter(**hot), red, settings, seed=seed)
        assert found is not None
        hits["sneaky"] += found.record["score"] >= 0.5
        chance = RandomPrompts(queries=3, clip="toybox", length=1)
        target = Target(Painter(**hot), access=Access.QUERY, sampling=Sampling(), concept=red, query_limit=3)
        (by_chance,) = chance.search(target, {}, PLAIN, generator=torch.Generator().manual_seed(seed))
        hits["random"] += by_chance.record["score"] >= 0.5
    assert hits["sneaky"] == 8 and hits["random"] <= 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_generator_same_attempt(strategy: Any, red: AttackConcept) -> None:
    settings = dataclasses.replace(SMALL, strategy=strategy, queries=6)
    first, second, other = (attack(Painter(e=0.1, a=0.1), red, settings, seed=seed)[0] for seed in (3, 3, 4))
    assert first == second
    if strategy in ("rl", "brute_force"):
        assert first != other


# --- bad input, and every family ------------------------------------------------------------------


def test_what_it_lacks_is_told_before_it_asks(red: AttackConcept, run: Any) -> None:
    target = Target(Painter(), access=Access.QUERY, sampling=Sampling())
    assert SMALL.prepare(target, red, run=run) == {}
    with pytest.raises(UserError, match="concept letters: sneaky_prompt needs a detector"):
        SMALL.prepare(target, dataclasses.replace(red, detector=None), run=run)
    with pytest.raises(UserError, match="attack sneaky_prompt: clip is '/no/clip', which is neither a folder"):
        SneakyPrompt(clip="/no/clip").prepare(target, red, run=run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queries", 0),
        ("strategy", "guess"),
        ("confirm", 0),
        ("subwords", 0),
        ("longest", 0),
        ("success", -0.1),
        ("learning_rate", 0.0),
        ("most_replaced", 1.5),
        ("text_threshold", 2.0),
        ("beam_width", 0),
        ("drafts", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


def test_asks_every_family(red: AttackConcept, tiny_sd: Any, tiny_sdxl: Any, vocabulary: Path) -> None:
    from duo.families.flux import Flux
    from duo.families.sd3 import Sd3

    settings = dataclasses.replace(SMALL, queries=2)
    flows = (Sd3(sd3_pipeline(vocabulary), name="sd3"), Flux(flux_pipeline(vocabulary), name="flux"))
    for model in (tiny_sd, tiny_sdxl, *flows):
        before = [weights.clone() for weights in model.denoiser.parameters()]
        few_steps = Sampling(num_inference_steps=1)
        target = Target(model, access=Access.QUERY, sampling=few_steps, query_limit=2, concept=red)
        (found,) = settings.search(target, {}, PLAIN, generator=torch.Generator().manual_seed(0))
        assert target.queries == found.record["queries"] <= 2
        assert all(map(torch.equal, before, model.denoiser.parameters()))
        assert all(weights.grad is None for weights in model.denoiser.parameters())
