from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from duo.metrics.toybox_attributes import ToyboxAttributes, asked_for
from duo.toybox import language, world


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", {}),
        ("a red house", {"subject": "house", "colour": "red"}),
        ("An Orange Car on a city street", {"subject": "car", "colour": "orange", "place": "city"}),
        ("a blue tent under the stars, flat colours", {"subject": "tent", "colour": "blue", "place": "night"}),
        ("a tree by the sea with an evening sun", {"subject": "tree", "place": "beach", "extra": "sunset"}),
        ("a boat beside a street lamp", {"subject": "boat", "extra": "lantern"}),
        ("a treehouse with coloured carpets and greenery", {}),  # whole words only
        ("a house and a car in the snow", {"place": "snow"}),  # two subjects: none is asked for alone
    ],
)
def test_attributes_are_read_from_whole_words(prompt: str, expected: dict[str, str]) -> None:
    assert asked_for(prompt) == expected


def test_reads_every_caption_of_the_language_rightly() -> None:
    rng = np.random.default_rng(3)
    for _ in range(500):
        scene = world.sample_scene(rng)
        for attribute, value in asked_for(language.caption(scene, rng)).items():
            assert getattr(scene, attribute) == value


def test_right_and_wrong_pictures() -> None:
    rng = np.random.default_rng(5)
    scenes = [replace(world.sample_scene(rng), extra=None) for _ in range(80)]
    images = [world.render(scene, rng) for scene in scenes]
    prompts = [f"a {scene.colour} {scene.subject} {language.PLACE_WORDS[scene.place][0]}" for scene in scenes]
    metric = ToyboxAttributes()
    metric.update(images=images, references=None, prompts=prompts)
    assert len(metric.compute()) == 80 and np.mean(metric.compute()) > 0.98

    wrong = ToyboxAttributes()
    tents = [image for image, scene in zip(images, scenes, strict=True) if scene.subject == "tent"]
    wrong.update(images=tents, references=None, prompts=["a ball"] * len(tents))
    assert len(tents) > 5 and np.mean(wrong.compute()) < 0.1


def test_prompts_that_name_nothing_are_left_out() -> None:
    metric = ToyboxAttributes()
    blank = Image.new("RGB", (64, 64))
    metric.update(images=[blank, blank], references=None, prompts=["", "a red thing"])
    assert len(metric.compute()) == 1
    assert {name: len(right) for name, right in metric.by_attribute().items()} == {
        "subject": 0,
        "colour": 1,
        "place": 0,
        "extra": 0,
    }


def test_one_prompt_an_image() -> None:
    with pytest.raises(ValueError, match="one prompt an image"):
        ToyboxAttributes().update(images=[Image.new("RGB", (64, 64))], references=None, prompts=[])
