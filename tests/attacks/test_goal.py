from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hard_prompts import Blind, SpellingFamily, attack_concept, target_of
from PIL import Image

from duo.attacks._goal import Goal, choose_goal, packed, shown
from duo.errors import UserError
from duo.plugins import Verdict


def choose(prompt: str, state: Any, *, original: Any = None, drawn: int = 2, seed: int = 0) -> Goal:
    target = target_of(Blind(), original=original or SpellingFamily(), limit=0)  # the goal costs no query
    return choose_goal(target, state, prompt, drawn=drawn, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_that_draws_the_concept_is_its_own_goal(concept: Any) -> None:
    original = SpellingFamily()
    goal = choose("a q", packed(attack_concept(concept)), original=original, drawn=3)
    assert (goal.prompt, goal.own) == ("a q", True)
    assert goal.image.getpixel((0, 0)) == 255
    assert original.drawn == ["a q"] * 3
    assert len(set(original.seeds)) == 3


def test_a_neutral_prompt_borrows_the_attackers_image_with_the_nearest_caption(concept: Any) -> None:
    images = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (10, 20, 30)]
    concept = attack_concept(concept, attack_images=images, attack_captions=("a x y", "c x", "b d"))
    for seed in range(3):
        goal = choose("d c b", packed(concept), seed=seed)  # two of three words, against one of four
        assert (goal.prompt, goal.own) == ("q b", False)
        assert goal.image.getpixel((0, 0)) == (30, 0, 0)
    assert goal.record() == {"goal_prompt": "q b", "goal_from": "attack images"}
    assert {choose("x", packed(concept), seed=seed).prompt for seed in range(9)} == {"q c"}  # one of two, not of three
    assert {choose("z", packed(concept), seed=seed).prompt for seed in range(20)} == {"q a", "q c", "q b"}


def test_the_surest_of_the_images_is_the_goal(concept: Any) -> None:
    class Brighter(SpellingFamily):
        def image_of(self, prompt: str) -> Image.Image:
            return Image.new("L", (4, 4), (240, 250, 245)[(len(self.drawn) - 1) % 3])

    assert choose("z", packed(attack_concept(concept)), original=Brighter(), drawn=3).image.getpixel((0, 0)) == 250


def test_shown_is_the_share_before_the_score() -> None:
    class Sure:
        digest = "sure"

        def __call__(self, images: Any) -> list[Verdict]:
            return [Verdict(label="present", scores={"present": 0.5}), Verdict(label="corrupted", scores={"other": 1})]

    target = target_of(Blind())
    target.concept = dataclasses.replace(target.concept, detector=Sure())
    assert shown(target, [Image.new("L", (1, 1))] * 2) == (0.5, 0.25)


def test_without_any_image_of_the_concept_there_is_no_goal(concept: Any) -> None:
    bare = attack_concept(concept, attack_images=(), attack_prompts=(), attack_captions=())
    with pytest.raises(UserError, match="no image shows the concept: the prompt 'a b' draws none"):
        choose("a b", packed(bare))


def test_images_without_prompts_are_refused(concept: Any) -> None:
    with pytest.raises(UserError, match="concept letters: 3 attack_images but 0 attack_prompts"):
        packed(dataclasses.replace(attack_concept(concept), attack_prompts=()))
