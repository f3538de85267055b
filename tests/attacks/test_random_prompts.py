from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import Asked, Painter, Redness

from duo.attacks.random_prompts import RandomPrompts
from duo.concept import AttackConcept
from duo.errors import UserError
from duo.plugins import Access, Attack, Attempt, Sampling
from duo.target import AccessError, Target
from tiny_flow import flux_pipeline, sd3_pipeline

WORDS = ("ember", "spark", "stone", "cloud", "river")
SMALL = RandomPrompts(queries=12, length=2, vocabulary=WORDS)


def attack(model: Any, concept: AttackConcept, settings: RandomPrompts = SMALL, *, seed: int = 1, **target: Any) -> Any:
    """The attempt, with the target."""
    limits = {"query_limit": settings.queries, **target}
    asked = Target(model, access=RandomPrompts.access, sampling=Sampling(), concept=concept, **limits)
    found = list(settings.search(asked, {}, "a house", generator=torch.Generator().manual_seed(seed)))
    return (found[0] if found else None), asked


@pytest.fixture
def red(concept: AttackConcept) -> AttackConcept:
    return dataclasses.replace(concept, detector=Redness())


def test_is_an_attack_that_only_asks(red: AttackConcept) -> None:
    assert isinstance(SMALL, Attack)
    assert RandomPrompts.access == Access.QUERY
    model = Asked(Painter(ember=0.9))
    attack(model, red)
    assert model.touched == {"generate"}


def test_keeps_the_prompt_whose_image_the_detector_is_surest_of(red: AttackConcept) -> None:
    painter = Painter(ember=0.4, spark=0.3, stone=0.1)
    found, target = attack(painter, red, seed=2)
    rewards = [painter.level(prompt) for prompt in painter.prompts]
    assert len(rewards) == target.queries == found.record["queries"] == 12
    assert found.prompt == painter.prompts[rewards.index(max(rewards))]
    assert found.record["score"] == pytest.approx(max(rewards), abs=1 / 255)
    assert found.record["label"] == ("present" if max(rewards) >= 0.5 else "absent")
    assert max(rewards) > rewards[0], "the first was not the best by luck"


def test_words_stand_before_the_prompt_or_in_its_place(red: AttackConcept) -> None:
    for mode in ("before", "alone"):
        painter = Painter()
        attack(painter, red, dataclasses.replace(SMALL, mode=mode))
        words = [prompt.split() for prompt in painter.prompts]
        assert {len(one) for one in words} == {4 if mode == "before" else 2}
        assert {word for one in words for word in one[:2]} == set(WORDS)
        assert all(one[2:] == (["a", "house"] if mode == "before" else []) for one in words)


def test_without_queries_the_first_random_prompt_is_the_attempt(red: AttackConcept) -> None:
    painter = Painter(ember=1.0)
    found, target = attack(painter, red, dataclasses.replace(SMALL, queries=0))
    assert target.queries == 0 and painter.prompts == []
    assert found == Attempt(prompt=found.prompt, record={"queries": 0})
    assert found.prompt.endswith(" a house") and set(found.prompt.split()[:2]) <= set(WORDS)


def test_a_target_that_grants_less_is_not_asked_for_more(red: AttackConcept) -> None:
    for granted in (0, 1, 5):
        found, target = attack(Painter(), red, query_limit=granted)
        assert target.queries == found.record["queries"] == granted
    _, unlimited = attack(Painter(), red, query_limit=None)
    assert unlimited.queries == 12


def test_images_are_asked_for_in_batches_with_seeds_of_their_own(red: AttackConcept) -> None:
    painter = Painter(ember=0.4, spark=0.3)
    found, _ = attack(painter, red, dataclasses.replace(SMALL, batch_size=5))
    assert painter.batches == [5, 5, 2]
    assert len(set(painter.seeds)) == 12
    assert found == attack(Painter(ember=0.4, spark=0.3), red, dataclasses.replace(SMALL, batch_size=12))[0]


def test_same_generator_same_attempt(red: AttackConcept) -> None:
    first, second, other = (attack(Painter(ember=0.4, spark=0.3), red, seed=seed)[0] for seed in (3, 3, 4))
    assert first == second != other


def test_what_would_be_refused_is_neither_asked_for_nor_yielded(
    red: AttackConcept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "ember" if "ember" in prompt else None)
    painter = Painter(ember=1.0)
    found, target = attack(painter, red)
    assert target.queries == 12
    assert not any("ember" in prompt for prompt in [*painter.prompts, found.prompt])
    monkeypatch.setattr(Target, "refused", lambda self, prompt: "all")
    assert attack(painter, red)[0] is None


def test_by_default_the_words_are_those_of_a_clip(red: AttackConcept, run: Any) -> None:
    settings = RandomPrompts(queries=6, clip="toybox")
    target = Target(Painter(), access=Access.QUERY, sampling=Sampling(), concept=red)
    assert settings.prepare(target, red, run=run) == {}
    painter = Painter()
    attack(painter, red, settings)
    words = {word for prompt in painter.prompts for word in prompt.split()[:5]}
    assert len(words) > 20
    assert all(word.isascii() and word.isalpha() and len(word) <= 9 for word in words)


def test_what_it_lacks_is_told_before_it_asks(red: AttackConcept, run: Any) -> None:
    target = Target(Painter(), access=Access.QUERY, sampling=Sampling())
    blind = dataclasses.replace(red, detector=None)
    with pytest.raises(UserError, match="concept letters: random_prompts needs a detector"):
        SMALL.prepare(target, blind, run=run)
    assert dataclasses.replace(SMALL, queries=0).prepare(target, blind, run=run) == {}
    with pytest.raises(UserError, match="attack random_prompts: clip is '/no/clip'"):
        RandomPrompts(clip="/no/clip").prepare(target, red, run=run)


def test_a_target_with_less_access_is_a_mistake(red: AttackConcept) -> None:
    with pytest.raises(AccessError, match="tokenizer"):  # the fence stands: QUERY has no tokenizer
        Target(Painter(), access=RandomPrompts.access, sampling=Sampling()).tokenizer()
    with pytest.raises(ValueError, match="without a concept"):
        attack(Painter(), dataclasses.replace(red, detector=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queries", -1),
        ("length", 0),
        ("mode", "after"),
        ("vocabulary", ("a", " ")),
        ("longest", 0),
        ("batch_size", 0),
        ("drafts", 0),
    ],
)
def test_impossible_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(SMALL, **{field: value})


def test_asks_every_family(red: AttackConcept, tiny_sd: Any, tiny_sdxl: Any, vocabulary: Path) -> None:
    from duo.families.flux import Flux
    from duo.families.sd3 import Sd3

    settings = dataclasses.replace(SMALL, queries=2, clip="toybox")
    for model in (
        tiny_sd,
        tiny_sdxl,
        Sd3(sd3_pipeline(vocabulary), name="s"),
        Flux(flux_pipeline(vocabulary), name="f"),
    ):
        before = [weights.clone() for weights in model.denoiser.parameters()]
        target = Target(
            model, access=Access.QUERY, sampling=Sampling(num_inference_steps=1), query_limit=2, concept=red
        )
        (found,) = settings.search(target, {}, "a red house", generator=torch.Generator().manual_seed(0))
        assert target.queries == found.record["queries"] == 2
        assert all(map(torch.equal, before, model.denoiser.parameters()))
