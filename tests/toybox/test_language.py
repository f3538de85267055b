"""The frozen splits, captions and concept files of the embedded world."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from duo.concept import load_concept
from duo.toybox import concept_files, language, world


def test_splits_are_disjoint_balanced_and_complete() -> None:
    rows = {split: set(language.combinations(split)) for split in language.SPLITS}
    assert {split: len(found) for split, found in rows.items()} == {"pair": 60, "validation": 60, "test": 60}
    assert len(set.union(*rows.values())) == 180
    for found in rows.values():
        assert set(Counter(colour for _, colour, _ in found).values()) == {10}
        assert set(Counter(subject for subject, _, _ in found).values()) == {10}


@pytest.mark.parametrize("hazard", world.HAZARDS)
def test_no_route_is_in_two_splits(hazard: str) -> None:
    routes = [route for split in language.SPLITS for route in language.ROUTES[hazard][split]]
    assert len(routes) == len(set(routes))
    assert len(routes) >= (25 if hazard == "fire" else 10)


def test_a_caption_names_its_hazard_by_a_route_and_never_one_that_is_not_there() -> None:
    rng = np.random.default_rng(5)
    patterns = {
        hazard: [_words(route) for split in language.SPLITS for route in language.ROUTES[hazard][split]]
        for hazard in world.HAZARDS
    }
    for _ in range(500):
        scene = world.sample_scene(rng)
        told = set(language.caption(scene, rng).replace(",", " ").split())
        named = [hazard for hazard, routes in patterns.items() if any(route <= told for route in routes)]
        assert (scene.hazard in named) if scene.hazard else not named, (scene, told)


def _words(route: str) -> set[str]:
    """The words of a route that no benign caption has."""
    filler = {"{np}", "{n}", "{place}", "a", "an", "the", "in", "on", "of", "at", "by", "with", "that", "and"}
    return set(route.split()) - filler


def test_articles_follow_the_noun() -> None:
    assert language.phrase("{np} {place}", "house", "orange", "at night") == "an orange house at night"
    assert language.phrase("a burning {n} {place}", "car", "") == "a burning car"


@pytest.mark.parametrize("hazard", world.HAZARDS)
def test_the_shipped_concept_file_is_the_one_that_the_language_makes(hazard: str) -> None:
    assert (concept_files.FOLDER / f"toybox-{hazard}.toml").read_text() == concept_files.concept_file(hazard)


def test_scored_prompts_share_no_combination_and_no_held_out_wording_with_the_pairs() -> None:
    concept = load_concept("toybox-fire")
    seen = {_combination(prompt) for prompt in concept.pairs.unsafe}
    for sets in (concept.prompts, concept.validation.prompts):
        for name, prompts in sets.items():
            assert not seen & {_combination(prompt) for prompt in prompts}, name
    assert not {_combination(p) for p in concept.prompts["plain"]} & {
        _combination(p) for p in concept.validation.prompts["plain"]
    }
    for sets in (concept.prompts, concept.validation.prompts):
        assert not any(word in prompt for word in concept.words for prompt in sets["held_out_words"])


def _combination(prompt: str) -> tuple[str, ...]:
    words = prompt.replace(",", " ").split()
    subject = next(s for s in world.SUBJECTS if s in words)
    colour = next(c for c in world.COLOURS if c in words)
    place = next(p for p, phrases in language.PLACE_WORDS.items() if any(phrase in prompt for phrase in phrases))
    return subject, colour, place
