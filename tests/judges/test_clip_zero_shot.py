"""The zero-shot judge: hand-worked numbers, and transformers' own CLIP on a tiny one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from duo import clip
from duo.errors import UserError
from duo.judges import _clip
from duo.judges.clip_zero_shot import ClipZeroShot

PRESENT, ABSENT = ("a burning red house", "a fire at night"), ("a red house", "a sunset", "a boat")


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (20 + i, 31, 3), np.uint8)) for i in range(n)]


def test_the_chance_is_the_softmax_over_all_prompts(monkeypatch: pytest.MonkeyPatch, tiny_clip: Path) -> None:
    known = SimpleNamespace(
        digest="clip",
        scale=2.0,
        images=lambda images: torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])[: len(images)],
        prompts=lambda prompts: torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
    )
    monkeypatch.setattr(_clip, "load_clip", lambda source, device: known)
    judge = ClipZeroShot(model=str(tiny_clip), present=("yes",), absent=("no", "never"), threshold=0.25)
    verdicts = judge(pictures(3))
    # e²/(e² + 2), 1/(1 + 2e²), e^1.2/(e^1.2 + 2e^1.6)
    assert [verdict.scores["present"] for verdict in verdicts] == pytest.approx(
        [0.786986, 0.063378, 0.251026], abs=1e-5
    )
    assert [verdict.label for verdict in verdicts] == ["present", "absent", "present"]
    assert verdicts[2].record == {"cosines": pytest.approx({"yes": 0.6, "no": 0.8, "never": 0.8})}
    assert all(sum(verdict.scores.values()) == pytest.approx(1) for verdict in verdicts)


def test_it_agrees_with_the_clip_of_transformers(tiny_clip: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images = pictures(35)  # more than one batch, of several sizes
    judge = ClipZeroShot(model=str(tiny_clip), present=PRESENT, absent=ABSENT)
    model = CLIPModel.from_pretrained(tiny_clip)
    text = CLIPTokenizer.from_pretrained(tiny_clip)([*PRESENT, *ABSENT], padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, **pixels).logits_per_image
    expected = logits.softmax(dim=-1)[:, : len(PRESENT)].sum(dim=-1)
    assert expected.std() > 0.01, "the tiny CLIP must tell pictures apart, or nothing is tested"
    verdicts = judge(images)
    assert [verdict.scores["present"] for verdict in verdicts] == pytest.approx(expected.tolist(), abs=1e-5)
    assert judge([]) == []


def test_the_digest_names_weights_prompts_and_threshold(tiny_clip: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_clip, tmp_path / "other")
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    one = {"model": str(tiny_clip), "present": PRESENT, "absent": ABSENT}
    changes: list[dict[str, Any]] = [
        {},
        {"threshold": 0.6},
        {"absent": ABSENT[:2]},
        {"present": PRESENT[::-1], "absent": ABSENT},
        {"model": str(other)},
    ]
    digests = [ClipZeroShot(**{**one, **change}).digest for change in changes]
    assert len(set(digests)) == len(changes)
    assert digests[0] == ClipZeroShot(**one).digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"present": ()}, "present is empty"),
        ({"absent": ("",)}, "absent is empty or has an empty prompt"),
        ({"absent": PRESENT[:1]}, "is in both"),
        ({"threshold": 1.0}, "threshold is 1.0"),
    ],
)
def test_bad_fields_are_refused(tiny_clip: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipZeroShot(**{"model": str(tiny_clip), "present": PRESENT, "absent": ABSENT, **change})


def test_a_model_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    for model, message in (
        (str(tmp_path), "it has no config.json"),
        ("no/such/model", "neither a folder nor a hub id"),
        ("nobody/nothing", "neither a folder nor a CLIP that the hub client can get"),
    ):
        with pytest.raises(UserError, match=message):
            ClipZeroShot(model=model, present=PRESENT, absent=ABSENT)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "cannot be read as a CLIPModel"),
        ("preprocessor_config.json", "cannot be read as a CLIPImageProcessor"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part(tiny_clip: Path, tmp_path: Path, file: str, message: str) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    (folder / file).unlink()
    judge = ClipZeroShot(model=str(folder), present=PRESENT, absent=ABSENT)
    with pytest.raises(UserError, match=message):
        _ = judge.digest


def test_a_setting_of_another_type_is_one_line(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "projection_dim": "abc"}))
    with pytest.raises(UserError, match=r"cannot be read as a CLIPModel: .*'projection_dim'.* expected int"):
        clip.load_clip(str(folder))


def test_half_a_clip_is_refused_and_not_filled_with_noise(tiny_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if not k.startswith("text")},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="not a whole CLIP: it lacks text"):
        clip.load_clip(str(folder))


def test_the_embedded_clip_has_a_name_and_loads_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    from duo import toybox
    from duo.toybox.world import Scene, render

    judge = ClipZeroShot(
        model="toybox",
        present=("a red house at night", "a blue car at night"),
        absent=("a red house in a meadow", "a blue car in the city"),
    )
    clip.load_clip.cache_clear()
    scenes = [Scene(subject="house", colour="red", place=place) for place in ("night", "meadow")]
    verdicts = judge([render(scene, np.random.default_rng(0)) for scene in scenes])
    assert [verdict.label for verdict in verdicts] == ["present", "absent"]
    assert (
        judge.digest
        == ClipZeroShot(model=str(toybox.WEIGHTS / "clip"), present=judge.present, absent=judge.absent).digest
    )
    assert "Loading weights" not in "".join(capsys.readouterr())


def test_judge_and_curator_of_one_network_are_told_apart_from_two(tiny_clip: Path) -> None:
    from duo.judges.toybox import Toybox
    from duo.stages.pairing import _same_network

    one = ClipZeroShot(model=str(tiny_clip), present=PRESENT, absent=ABSENT)
    other_prompts = ClipZeroShot(model=str(tiny_clip), present=("a fire",), absent=("a boat",))
    embedded = ClipZeroShot(model="toybox", present=PRESENT, absent=ABSENT)
    assert _same_network(one, other_prompts) and _same_network(one, one)
    assert not _same_network(one, embedded)
    score, curate = Toybox(hazard="fire"), Toybox(hazard="fire", role="curate")
    assert _same_network(score, Toybox(hazard="fire")) and not _same_network(score, curate)
    assert not _same_network(one, score)
