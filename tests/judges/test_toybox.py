"""The embedded judges on freshly rendered scenes: seeds that neither their training nor their evaluation used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image

from duo.errors import UserError
from duo.judges.toybox import Toybox
from duo.toybox.damage import HAZARD_DAMAGES, SCENE_DAMAGES
from duo.toybox.networks import LABELS, WEIGHTS
from duo.toybox.train_judges import damaged_picture, natural_pictures, near_misses
from duo.toybox.world import HAZARDS, Scene

SEED = 7_000_001  # rates of every judge are in docs/toybox.md; the bounds here leave room for small samples
EVERY = [(hazard, role) for hazard in HAZARDS for role in ("score", "curate")]


def labels(judge: Toybox, pictures: Iterable[tuple[Scene, np.ndarray]]) -> list[str]:
    return [verdict.label for verdict in judge([Image.fromarray(picture) for _, picture in pictures])]


@pytest.mark.parametrize(("hazard", "role"), EVERY)
def test_tells_present_from_absent(hazard: str, role: str) -> None:
    judge = Toybox(hazard=hazard, role=role)
    present = labels(judge, natural_pictures(40, seed=SEED, hazard=hazard))
    absent = labels(judge, (p for p in natural_pictures(80, seed=SEED + 1) if p[0].hazard != hazard))
    assert present.count("present") >= 39
    assert absent.count("absent") >= len(absent) - (1 if (hazard, role) == ("fire", "score") else 4)


@pytest.mark.parametrize("role", ["score", "curate"])
def test_near_misses_are_no_fire(role: str) -> None:
    assert labels(Toybox(hazard="fire", role=role), near_misses(80, seed=SEED + 2)).count("absent") >= 79


@pytest.mark.parametrize(("hazard", "role"), EVERY)
def test_a_spoiled_hazard_is_corrupted(hazard: str, role: str) -> None:
    rng = np.random.default_rng(SEED + 3)
    kinds = [damage for damage in HAZARD_DAMAGES if damage != "remnant"]
    spoiled = [damaged_picture(hazard, damage, rng) for damage in kinds for _ in range(10)]
    assert labels(Toybox(hazard=hazard, role=role), spoiled).count("corrupted") >= (39 if hazard == "graffiti" else 43)


@pytest.mark.parametrize(("hazard", "role"), EVERY)
def test_a_spoiled_scene_is_corrupted(hazard: str, role: str) -> None:
    rng = np.random.default_rng(SEED + 6)
    spoiled = [damaged_picture(None, damage, rng) for damage in SCENE_DAMAGES for _ in range(15)]
    assert labels(Toybox(hazard=hazard, role=role), spoiled).count("corrupted") >= 38


@pytest.mark.parametrize("role", ["score", "curate"])
def test_a_good_part_of_a_fire_is_fire(role: str) -> None:
    rng = np.random.default_rng(SEED + 7)
    left = [damaged_picture("fire", damage, rng) for damage in ("remnant", *SCENE_DAMAGES) for _ in range(10)]
    assert labels(Toybox(hazard="fire", role=role), left).count("present") >= 35


def test_another_hazard_spoiled_is_absent() -> None:
    rng = np.random.default_rng(SEED + 4)
    spoiled = [damaged_picture("graffiti", damage, rng) for damage in HAZARD_DAMAGES for _ in range(5)]
    assert labels(Toybox(hazard="fire"), spoiled).count("absent") >= 27


def test_scores_are_probabilities_and_the_label_is_the_largest() -> None:
    images = [Image.fromarray(picture) for _, picture in natural_pictures(70, seed=SEED + 5)]  # more than one batch
    verdicts = Toybox(hazard="fire")(images)
    assert len(verdicts) == 70
    for verdict in verdicts:
        assert tuple(verdict.scores) == LABELS
        assert sum(verdict.scores.values()) == pytest.approx(1, abs=1e-5)
        assert verdict.scores[verdict.label] == max(verdict.scores.values())


def test_other_sizes_are_judged_alike_and_no_images_give_no_verdicts() -> None:
    images = [Image.fromarray(picture).resize((128, 128)) for _, picture in natural_pictures(10, seed=1, hazard="fire")]
    assert [verdict.label for verdict in Toybox(hazard="fire")(images)].count("present") >= 9
    assert Toybox(hazard="fire")([]) == []


def test_the_digest_names_the_weights() -> None:
    digests = {name: Toybox(hazard=name[0], role=name[1]).digest for name in EVERY}
    assert len(set(digests.values())) == len(EVERY)
    assert digests["fire", "score"] == hashlib.sha256((WEIGHTS / "fire-score.safetensors").read_bytes()).hexdigest()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'fire'"):
        Toybox(hazard="fires")
    with pytest.raises(UserError, match="did you mean 'score'"):
        Toybox(hazard="fire", role="scores")  # type: ignore[arg-type]
