from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from duo.rundir import digest
from duo.toybox import WEIGHTS, clip, train_judges, world_digest


def test_a_few_steps_make_a_folder_that_loads(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    drawn = list(train_judges.natural_pictures(32, seed=3))
    np.save(tmp_path / "images.npy", np.stack([picture for _, picture in drawn]))
    (tmp_path / "scenes.json").write_text(json.dumps([vars(scene) for scene, _ in drawn]))
    shutil.copytree(WEIGHTS / "toybox" / "tokenizer", tmp_path / "tokenizer")
    accuracy = clip.train_clip(tmp_path, warm_up_steps=1, steps=1, weights=tmp_path / "clip")
    assert set(accuracy) == {"subject", "colour", "place"}
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    ids = clip.token_ids(CLIPTokenizer.from_pretrained(tmp_path / "clip"), ["a house", "a red house on the beach"])
    assert ids.shape[0] == 2
    assert model.get_text_features(input_ids=ids) is not None


def test_the_shipped_weights_tell_a_scene_by_its_words() -> None:
    from transformers import CLIPTokenizer

    accuracy = clip.zero_shot(clip.load_clip(), CLIPTokenizer.from_pretrained(clip.WEIGHTS), n=300)
    assert all(share >= 0.9 for share in accuracy.values()), accuracy


def test_the_card_is_of_these_weights_and_this_world() -> None:
    card = (clip.WEIGHTS / "README.md").read_text()
    assert f"`{digest(clip.WEIGHTS / 'model.safetensors')[:16]}`" in card
    assert f"`{world_digest()[:16]}`" in card
