"""Q16: hand-worked numbers, and a tiny CLIP against the formula of the authors' code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from duo.errors import UserError
from duo.judges import _clip
from duo.judges.q16 import Q16


def write_prompts(path: Path, *rows: list[float], name: str = "prompts") -> Path:
    save_file({name: torch.tensor(rows, dtype=torch.float16)}, path)
    return path


def test_the_nearer_prompt_wins(monkeypatch: pytest.MonkeyPatch, tiny_clip: Path, tmp_path: Path) -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.705, 0.709208]])
    known = SimpleNamespace(digest="clip", width=2, images=lambda images: vectors[: len(images)])
    monkeypatch.setattr(_clip, "load_clip", lambda source, device: known)
    file = write_prompts(tmp_path / "p.safetensors", [3.0, 0.0], [0.0, 0.5])  # made unit vectors: lengths say nothing
    verdicts = Q16(prompts=str(file), model=str(tiny_clip))([Image.new("RGB", (8, 8))] * 3)
    assert [verdict.label for verdict in verdicts] == ["absent", "present", "present"]
    # 1/(1 + e^(100·(fine − inappropriate))): of −100, 20 and 0.4208
    assert [verdict.scores["present"] for verdict in verdicts] == pytest.approx([0.0, 1.0, 0.60367], abs=1e-4)
    assert verdicts[1].record["cosines"] == pytest.approx({"fine": 0.6, "inappropriate": 0.8})


def test_on_a_tiny_clip_it_is_the_published_formula(tiny_clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel

    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(12)]
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=images, return_tensors="pt")
    with torch.no_grad():
        features = CLIPModel.from_pretrained(tiny_clip).get_image_features(**pixels).pooler_output
    features = features / features.norm(dim=-1, keepdim=True)
    # Two prompts with which neither answer is sure: the difference of two pictures turns the answer.
    prompts = torch.stack([features[0], features[1]]).half()
    save_file({"prompts": prompts}, tmp_path / "p.safetensors")
    unit = prompts.float() / prompts.float().norm(dim=-1, keepdim=True)
    expected = (100.0 * features @ unit.T).argmax(dim=-1)
    verdicts = Q16(prompts=str(tmp_path / "p.safetensors"), model=str(tiny_clip))(images)
    assert set(expected.tolist()) == {0, 1}
    assert [verdict.label for verdict in verdicts] == [("absent", "present")[index] for index in expected]
    assert verdicts[0].record["cosines"]["fine"] == pytest.approx(1, abs=1e-3)


def test_the_digest_names_the_prompts(tiny_clip: Path, tmp_path: Path) -> None:
    one = write_prompts(tmp_path / "1.safetensors", [1.0] * 8, [0.5] * 7 + [0.0])
    two = write_prompts(tmp_path / "2.safetensors", [0.5] * 7 + [0.0], [1.0] * 8)
    digests = {Q16(prompts=str(path), model=str(tiny_clip)).digest for path in (one, two)}
    digests.add(Q16(prompts=str(one), model=str(tiny_clip), threshold=0.9).digest)
    assert len(digests) == 3


def test_what_is_missing_is_told(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.safetensors; docs"):
        Q16(prompts=str(tmp_path / "absent.safetensors"), model=str(tiny_clip))
    file = write_prompts(tmp_path / "p.safetensors", [1.0, 0.0], [0.0, 1.0])
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        Q16(prompts=str(file), model="no/such/clip")
    with pytest.raises(ValueError, match="threshold is 0"):
        Q16(prompts=str(file), model=str(tiny_clip), threshold=0)
    with pytest.raises(UserError, match=r"shape \(2, 2\), expected \(2, 8\)"):
        _ = Q16(prompts=str(file), model=str(tiny_clip)).digest
    other = write_prompts(tmp_path / "q.safetensors", [1.0] * 8, [2.0] * 8, name="vectors")
    with pytest.raises(UserError, match="no tensor 'prompts'"):
        _ = Q16(prompts=str(other), model=str(tiny_clip)).digest
    (tmp_path / "r.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        _ = Q16(prompts=str(tmp_path / "r.safetensors"), model=str(tiny_clip)).digest
