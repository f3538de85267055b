from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from duo import toybox
from duo.errors import UserError
from duo.metrics._clip_score import clip_scores
from duo.metrics.clip_score import ClipScore
from duo.metrics.toybox_clip_score import ToyboxClipScore

PROMPTS = ["a red house", "a blue boat at night", "a red house"]


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)) for _ in range(n)]


def test_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    prompts = torch.tensor([[0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]])
    assert clip_scores(images, prompts) == pytest.approx([60, 100, 0])


def test_it_is_the_cosine_that_transformers_gives() -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder, images = toybox.WEIGHTS / "clip", pictures(3)
    model = CLIPModel.from_pretrained(folder).eval()
    text = CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask, **pixels).logits_per_image
    expected = (100 * logits.diagonal() / model.logit_scale.exp()).clamp(min=0)
    for metric in (ToyboxClipScore(), ClipScore(model=str(folder))):
        metric.update(images=images[:1], references=None, prompts=PROMPTS[:1])
        metric.update(images=images[1:], references=None, prompts=PROMPTS[1:])
        assert metric.compute() == pytest.approx(expected.tolist(), abs=1e-3)
    assert expected.std() > 0.1


def test_neither_is_called_by_the_others_name() -> None:
    assert (ClipScore.name, ToyboxClipScore.name) == ("CLIP score", "toybox-CLIP score")
    assert ToyboxClipScore().protocol()["network"] == "CLIP toybox"


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="metric CLIP score: model is 'no/where/at/all', which is neither a folder nor"):
        ClipScore(model="no/where/at/all").check()
    with pytest.raises(UserError, match=r"metric CLIP score: .* is not a CLIP folder"):
        ClipScore(model=str(tmp_path)).check()
    with pytest.raises(UserError, match="give the metric's model a local folder"):
        ClipScore(model="some/body").check()


def test_one_prompt_an_image() -> None:
    with pytest.raises(ValueError, match="one prompt an image"):
        ToyboxClipScore().update(images=pictures(2), references=None, prompts=["a red house"])
