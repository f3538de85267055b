"""FID's and KID's network is torch-fidelity's class, which is not needed here: one that stands in for it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from duo.errors import UserError
from duo.metrics import _inception
from duo.metrics.fid import Fid
from duo.metrics.kid import Kid

PUBLISHED = "weights-inception-2015-12-05-6726825d"


class StandIn(nn.Module):
    """Takes and gives what torch-fidelity's class does: bytes (n, 3, height, width), a tuple of features."""

    made = 0

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.weight = nn.Parameter(torch.zeros(3))
        self.load_state_dict(torch.load(feature_extractor_weights_path))
        type(self).made += 1

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        assert x.dtype == torch.uint8
        return (x.float().mean(dim=(2, 3)) * self.weight,)


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    _inception._load.cache_clear()
    return folder


@pytest.fixture
def fidelity(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch-fidelity, and weights, where torch keeps what it downloads."""
    import torchmetrics.image.fid  # noqa: F401  (which looks for the real one when it is first imported)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(StandIn, "made", 0)
    save_file({"weight": torch.tensor([1.0, 2.0, 0.5])}, checkpoints / f"{PUBLISHED}.safetensors")
    return checkpoints


def test_pictures_of_several_sizes_keep_their_order(fidelity: Path) -> None:
    images = [Image.new("RGB", (8 + i % 2, 9), (i, 2 * i, 200)) for i in range(70)]
    metric = Fid()
    metric.check()
    rows = metric.features(images)
    assert rows == pytest.approx(np.array([[i, 4 * i, 100] for i in range(70)]))
    assert metric.compute(rows, rows) == pytest.approx(0, abs=1e-3)
    other = Kid()
    other.features(images[:1])
    assert StandIn.made == 1, "FID and KID share the network"
    assert metric.digest == other.digest == metric.protocol()["digest"]


def test_what_is_missing_is_told(checkpoints: Path) -> None:
    for leaf, name in ((Fid, "fid"), (Kid, "kid")):
        with pytest.raises(UserError) as caught:
            leaf().check()
        told = str(caught.value)
        assert f"put {PUBLISHED}.pth (or its tensors as {PUBLISHED}.safetensors) into {checkpoints}" in told
        assert f"score.metrics.{name}.inception" in told and "\n" not in told


def test_without_torch_fidelity_one_line_says_so(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.zeros(3)}, checkpoints / f"{PUBLISHED}.safetensors")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(UserError, match=r'need torch-fidelity, .*pip install -e "\.\[metrics\]"') as caught:
        Fid().check()
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_and_pickles_of_others_are_told(fidelity: Path) -> None:
    save_file({"other": torch.zeros(3)}, fidelity / "other.safetensors")
    with pytest.raises(UserError, match="is not the Inception-v3 of FID"):
        _ = Fid(inception=str(fidelity / "other.safetensors")).digest
    torch.save({"weight": torch.zeros(3)}, fidelity / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match=r"not 6726825d.* never read"):
        _ = Fid(inception=str(fidelity / "pt_inception-2015-12-05-6726825d.pth")).digest
