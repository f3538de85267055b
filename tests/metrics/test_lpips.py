"""LPIPS-Alex on a random AlexNet: torchmetrics' own, hand-worked numbers, and where its networks may come from."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from duo import published
from duo.errors import UserError
from duo.metrics import lpips
from duo.metrics.lpips import HEADS_SHA256, Lpips, alexnet_features, learned_distance

PUBLISHED = "alexnet-owt-7be5be79"


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """What the published file holds, at random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = alexnet_features().state_dict()
    return {**{f"features.{name}": one for name, one in layers.items()}, "classifier.6.bias": torch.zeros(3)}


@pytest.fixture
def alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights where torch keeps what it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    save_file(weights(), folder / f"{PUBLISHED}.safetensors")
    return folder


def pictures(n: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(7)
    return [Image.fromarray(rng.integers(0, 256, (side, side + 5, 3), np.uint8)) for _ in range(n)]


def test_by_hand() -> None:
    # As for toybox-LPIPS: one image, two layers, but heads weigh channels and layers are summed. (3, 4) beside (6, 8)
    # is the same direction, (1, 0) beside (0, 5) is (1, 1) apart in squares: with weights 2 and 3 a mean of 5/2. (2, 0)
    # beside (3, 4): (0.4², 0.8²), with weights 1 and 0.5: 0.16 + 0.32.
    a = [torch.tensor([[[[3.0, 1.0]], [[4.0, 0.0]]]]), torch.tensor([[[[2.0]], [[0.0]]]])]
    b = [torch.tensor([[[[6.0, 0.0]], [[8.0, 5.0]]]]), torch.tensor([[[[3.0]], [[4.0]]]])]
    heads = [torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])]
    assert learned_distance(a, b, heads).tolist() == pytest.approx([5 / 2 + 0.48])


def test_it_agrees_with_torchmetrics(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their network around the same AlexNet, with the heads that they ship; torchvision alone is not needed."""
    from torchmetrics.functional.image import lpips as theirs

    layers = alexnet_features()
    layers.load_state_dict({k.removeprefix("features."): v for k, v in weights().items() if k.startswith("features.")})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: layers)
    network = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    images = pictures(20)
    ours = Lpips()
    ours.update(images=images[:19], references=images[1:], prompts=[""] * 19)  # more than one batch
    arrays = np.stack([np.asarray(image) for image in images])
    x = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = 1 - network(x[:19], x[1:]).flatten()
    assert expected.std() > 1e-4
    assert ours.compute() == pytest.approx(expected.tolist(), abs=1e-5)
    same = Lpips()
    same.update(images=images[:2], references=images[:2], prompts=["", ""])
    assert same.compute() == [1, 1]


def test_what_is_missing_is_told_with_the_folder_to_put_it_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        Lpips().check()
    told = str(caught.value)
    assert f"put {PUBLISHED}.pth (or its tensors as {PUBLISHED}.safetensors) into {tmp_path}/hub/checkpoints" in told
    assert "score.metrics.lpips.alexnet" in told and "\n" not in told
    with pytest.raises(UserError, match="there is no such file; give the path of the AlexNet"):
        Lpips(alexnet=str(tmp_path / "none.pth")).check()
    with pytest.raises(UserError, match=r"names no file; expected hub:owner/name/file\.safetensors"):
        Lpips(alexnet="hub:some/body").check()
    with pytest.raises(UserError, match=r"give score\.metrics\.lpips\.alexnet a local file"):
        Lpips(alexnet="hub:some/body/alexnet.safetensors").check()  # the tests have no network


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.place),)  # type: ignore[attr-defined]


def test_no_pickle_but_the_published_one_is_opened(alexnet: Path, tmp_path: Path) -> None:
    bomb = _Bomb()
    bomb.place = str(tmp_path / "went-off")  # type: ignore[attr-defined]
    path = tmp_path / f"{PUBLISHED}.pth"
    path.write_bytes(pickle.dumps(bomb))
    metric = Lpips(alexnet=str(path))
    with pytest.raises(UserError, match=r"not the AlexNet of LPIPS as it was published .*not 7be5be79.* never read"):
        metric.protocol()
    named = tmp_path / f"alexnet-owt-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    named.write_bytes(path.read_bytes())  # a name that its own hash is in proves nothing
    with pytest.raises(UserError, match="never read"):
        Lpips(alexnet=str(named)).protocol()
    assert not (tmp_path / "went-off").exists()


def test_the_published_pickle_and_its_tensors_are_the_same(
    alexnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "alexnet.pth"
    torch.save(weights(), path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(lpips, "ALEXNET", published.Published(what="AlexNet", files=(f"alexnet-{found[:8]}.pth",)))
    digest = Lpips(alexnet=str(path)).protocol()["digest"]
    assert digest == Lpips(alexnet=str(alexnet / f"{PUBLISHED}.safetensors")).protocol()["digest"]
    bomb = _Bomb()
    bomb.place = str(tmp_path / "went-off")  # type: ignore[attr-defined]
    torch.save(bomb, path)  # even of the right hash, tensors alone are read
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(lpips, "ALEXNET", published.Published(what="AlexNet", files=(f"alexnet-{found[:8]}.pth",)))
    with pytest.raises(UserError, match="cannot be read as AlexNet"):
        Lpips(alexnet=str(path)).protocol()
    assert not (tmp_path / "went-off").exists()


def test_the_heads_are_those_of_version_0_1() -> None:
    path = lpips._own_heads()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == HEADS_SHA256


def test_a_file_without_a_layer_is_told(alexnet: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, alexnet / "short.safetensors")
    with pytest.raises(UserError, match="lacks a layer of LPIPS-Alex"):
        Lpips(alexnet=str(alexnet / "short.safetensors")).protocol()


def test_bad_pictures(alexnet: Path) -> None:
    with pytest.raises(ValueError, match="one reference an image"):
        Lpips().update(images=pictures(1), references=None, prompts=[""])
    with pytest.raises(ValueError, match="31 pixels a side at least, not 20"):
        Lpips().update(images=pictures(1, side=20), references=pictures(1, side=20), prompts=[""])
