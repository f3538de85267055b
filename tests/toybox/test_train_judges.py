from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duo.checkpoint import read_tensors
from duo.errors import UserError
from duo.toybox import damage as damages
from duo.toybox import networks, train_judges, world
from duo.toybox.networks import ATTRIBUTES, load_network, new_network


def test_damaged_pictures_show_what_was_asked_for() -> None:
    asked = [(hazard, damage) for hazard in world.HAZARDS for damage in damages.DAMAGES]
    asked += [(None, damage) for damage in damages.SCENE_DAMAGES]
    for hazard, damage in asked:
        scene, picture = train_judges.damaged_picture(hazard, damage, np.random.default_rng(2))
        assert (scene.hazard, scene.damage) == (hazard, damage)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8


def test_every_kind_of_damage_is_drawn_as_often_as_asked() -> None:
    counts = {"hazard": 2, "scene": 3, "scene with a hazard": 1}
    drawn = Counter((scene.hazard, scene.damage) for scene, _ in train_judges.damaged_pictures(counts, seed=1))
    assert drawn["fire", "stump"] == 2 and drawn[None, "melted"] == 3 and drawn["fire", "melted"] == 1
    assert (None, "stump") not in drawn


@pytest.mark.parametrize(
    ("hazard", "damage", "verdict"),
    [
        (None, None, "absent"),
        ("fire", None, "present"),
        ("fire", "remnant", "present"),
        ("fire", "melted", "present"),
        ("fire", "stump", "corrupted"),
        (None, "melted", "corrupted"),
        ("flooded", "melted", "corrupted"),
        ("flooded", "stump", "absent"),
        ("flooded", None, "absent"),
    ],
)
def test_what_a_judge_should_say(hazard: str | None, damage: str | None, verdict: str) -> None:
    scene = world.Scene(subject="car", colour="red", place="snow", hazard=hazard, damage=damage)
    assert train_judges.verdict_on(scene, "fire") == verdict


def test_a_damage_that_shows_nothing_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    render = world.render

    def no_damage_at_first(scene: world.Scene, rng: np.random.Generator) -> Image.Image:
        if scene.damage:
            drawn.append(scene.damage)
            scene = replace(scene, damage=None, hazard=None) if len(drawn) == 1 else scene
        return render(scene, rng)

    monkeypatch.setattr(world, "render", no_damage_at_first)
    train_judges.damaged_picture("fire", "discoloured", np.random.default_rng(0))
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "soften", [train_judges._blurred, train_judges._resized, train_judges._blocky, train_judges._noisy]
)
def test_softness_changes_a_picture_a_little(soften: Callable[..., torch.Tensor]) -> None:
    x = networks.as_pixels(np.stack([picture for _, picture in train_judges.natural_pictures(4, seed=1)]))
    soft = soften(x, torch.Generator().manual_seed(0))
    assert soft.shape == x.shape
    assert 0 < (soft - x).abs().mean() < 0.1


def test_augmentation_depends_on_the_generator_alone() -> None:
    x = torch.rand(10, 3, 64, 64) * 2 - 1
    first, again, other = (train_judges.augmented(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1


def test_attribute_labels() -> None:
    scene = world.Scene(subject="car", colour="red", place="snow", extra="lantern")
    labels = train_judges.attribute_labels([scene, world.Scene(subject="tent", colour="blue", place="city")])
    assert {name: values.tolist() for name, values in labels.items()} == {
        "subject": [1, 5],
        "colour": [0, 4],
        "place": [2, 4],
        "extra": [2, 0],
    }


def test_shipped_weights_say_how_good_they_are() -> None:
    for name in ["attributes", *train_judges.judge_names()]:
        _, record = read_tensors(networks.WEIGHTS / f"{name}.safetensors")
        assert record["network"] == name and record["renderer"] == world.RENDERER_VERSION
        accuracy = record["held_out"]["crisp"]["accuracy"]  # type: ignore[index]
        judged_strictly = set(accuracy) - {"corrupted", "spoiled_scenes", "remnants", "others_spoiled"}
        least = 0.975 if name.endswith("curate") else 0.99  # docs/toybox.md has the figures
        assert all(accuracy[key] >= least for key in judged_strictly), (name, accuracy)


def test_a_finished_training_is_read_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(train_judges.natural_pictures(48, seed=3))
    kinds = [(h, d) for h in world.HAZARDS for d in ("ghost", "remnant")] + [(None, "melted")]
    spoiled = [train_judges.damaged_picture(h, d, np.random.default_rng(1)) for h, d in kinds]
    for name, scenes, pictures in (("images", "scenes", drawn), ("damaged", "damaged", spoiled)):
        np.save(tmp_path / f"{name}.npy", np.stack([picture for _, picture in pictures]))
        (tmp_path / f"{scenes}.json").write_text(json.dumps([vars(scene) for scene, _ in pictures]))
    monkeypatch.setattr(train_judges, "STEPS", {"curate": 2})
    trained = train_judges.train_judge(tmp_path, "fire-curate").state_dict()
    monkeypatch.setattr(train_judges, "augmented", None)  # a further step would fail
    again = train_judges.train_judge(tmp_path, "fire-curate").state_dict()
    assert all(torch.equal(trained[key], again[key]) for key in trained)


def test_shipping_rounds_to_fp16_and_loads_as_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (networks, train_judges):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path)
    network = new_network("attributes")
    train_judges.ship("attributes", network, record={"crisp": {}})
    loaded = load_network("attributes")
    assert read_tensors(tmp_path / "attributes.safetensors")[0]["heads.place.weight"].dtype == torch.float16
    for key, value in loaded.state_dict().items():
        assert value.dtype != torch.float16
        assert torch.allclose(value.float(), network.state_dict()[key].float(), atol=1e-3)
    logits = loaded(torch.zeros(2, 3, 64, 64))
    assert {name: rows.shape for name, rows in logits.items()} == {n: (2, len(v)) for n, v in ATTRIBUTES.items()}


def test_missing_weights_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "WEIGHTS", tmp_path)
    with pytest.raises(UserError, match=r"fire-score\.safetensors is missing"):
        load_network("fire-score")


def test_the_counts_name_the_world_of_the_weights_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped: list[object] = []
    for name, stub in {
        "render_damaged": lambda work: None,
        "judge_names": lambda: (),
        "train_attributes": lambda work: torch.nn.Identity(),
        "load_network": lambda name: torch.nn.Identity(),
        "evaluate": lambda networks: {name: {"right": 1} for name in networks},
        "ship": lambda name, network, *, record: shipped.append(record),
    }.items():
        monkeypatch.setattr(train_judges, name, stub)
    monkeypatch.setattr(train_judges.toybox, "world_digest", lambda: f"after {len(shipped)} were shipped")
    train_judges.train_judges(tmp_path)
    told = json.loads((tmp_path / "judges.json").read_text())
    assert told == {"world_digest": "after 2 were shipped", "attributes": {"right": 1}}
