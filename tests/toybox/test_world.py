"""The renderer: the same pixels for the same scene and seed, and hazards that change what they should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from duo.toybox import damage as damages
from duo.toybox import world
from duo.toybox.world import Scene, render, sample_scene

SCENE = Scene(subject="house", colour="blue", place="meadow")


def pixels(scene: Scene, seed: int = 3) -> np.ndarray:
    return np.asarray(render(scene, np.random.default_rng(seed))).astype(int)


def test_a_scene_and_a_seed_fix_every_pixel() -> None:
    assert pixels(SCENE).shape == (64, 64, 3)
    assert np.array_equal(pixels(SCENE), pixels(SCENE))
    assert not np.array_equal(pixels(SCENE), pixels(SCENE, seed=4))


@pytest.mark.parametrize("hazard", world.HAZARDS)
@pytest.mark.parametrize("subject", world.SUBJECTS)
def test_a_hazard_changes_the_scene_and_only_in_part(subject: str, hazard: str) -> None:
    scene = replace(SCENE, subject=subject)
    changed = np.abs(pixels(scene) - pixels(replace(scene, hazard=hazard))).max(axis=-1) > 40
    assert 0.015 < changed.mean() < 0.5


@pytest.mark.parametrize("damage", damages.HAZARD_DAMAGES)
def test_damage_spoils_the_hazard(damage: str) -> None:
    burning = replace(SCENE, hazard="fire")
    assert np.abs(pixels(burning) - pixels(replace(burning, damage=damage))).mean() > 1


@pytest.mark.parametrize("damage", damages.SCENE_DAMAGES)
def test_damage_spoils_the_scene_and_leaves_the_hazard_on_it(damage: str) -> None:
    assert np.abs(pixels(SCENE) - pixels(replace(SCENE, damage=damage))).mean() > 1
    burning = replace(SCENE, hazard="fire")
    flames = np.abs(pixels(SCENE) - pixels(burning)).max(axis=-1) > 100
    untouched = np.abs(pixels(burning) - pixels(replace(burning, damage=damage))).max(axis=-1)[flames] < 12
    assert untouched.mean() > 0.9


def test_natural_rates() -> None:
    rng = np.random.default_rng(0)
    found = Counter(sample_scene(rng).hazard for _ in range(4000))
    for hazard, rate in zip((*world.HAZARDS, None), world.NATURAL_RATES, strict=True):
        assert found[hazard] / 4000 == pytest.approx(rate, abs=0.03)


def test_hazards_that_are_left_out_become_intact() -> None:
    rng = np.random.default_rng(0)
    assert {sample_scene(rng, hazards=("flooded",)).hazard for _ in range(300)} == {None, "flooded"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"subject": "castle"}, "subject is 'castle'"),
        ({"damage": "ghost"}, "ghost needs a hazard"),
        ({"subject": "car", "extra": "smoke"}, "only a house"),
        ({"place": "night", "extra": "sunset"}, "no sunset at night"),
    ],
)
def test_impossible_scenes_are_refused(fields: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(SCENE, **fields)
