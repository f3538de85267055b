"""No pickle is ever read: each of these would write a file if it were, and says so by that file."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ordeal
import pytest
import torch
from safetensors.torch import save_file

from duo.artefacts import find_artefact
from duo.checkpoint import read_tensors
from duo.clip import _read
from duo.delta import Delta
from duo.errors import UserError
from duo.models import family_of, load_family
from duo.published import read_pickle
from duo.sources import PICKLES, no_pickles

ENDINGS = (*PICKLES, ".pkl", ".p", ".npy", ".npz", ".safetensors")


class Payload:
    """Pickled, a call that writes a file when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.proof, "code was run")


def payload(proof: Path, kind: str) -> bytes:
    """A malicious file in each form that Python's readers of pickles know."""
    plain = pickle.dumps(Payload(proof))
    if kind == "plain":
        return plain
    buffer = io.BytesIO()
    if kind == "zip":  # as torch.save writes it
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", plain)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    elif kind == "legacy":
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, Payload(proof)):
            pickle.dump(part, buffer, protocol=2)
    else:
        np.save(buffer, np.array([Payload(proof)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


KINDS = ("plain", "zip", "legacy", "numpy")


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "proof"


@pytest.mark.parametrize("kind", ["plain", "legacy", "zip", "numpy"])
def test_the_payloads_would_be_run(tmp_path: Path, proof: Path, kind: str) -> None:
    """Else the rest would prove nothing."""
    path = tmp_path / "x"
    path.write_bytes(payload(proof, kind))
    read: Callable[[], Any] = {
        "plain": lambda: pickle.loads(path.read_bytes()),  # noqa: S301
        "numpy": lambda: np.load(path, allow_pickle=True),
    }.get(kind, lambda: torch.load(path, weights_only=False))
    with suppress(EOFError):  # of the old form, after it was run
        read()
    assert proof.read_text() == "code was run"


def refused(read: Callable[[], object], folder: Path, proof: Path) -> str:
    """What is told where a pickle was not read."""
    refusal = ordeal.endure("pickles", read, writes=folder)
    assert refusal is not None and not proof.exists()
    return str(refusal)


READERS: dict[str, Callable[[Path], object]] = {
    "delta": Delta.load,
    "tensors": read_tensors,
    "artefact": lambda path: find_artefact(str(path)),
    "model": lambda path: load_family(str(path)),
    "settings": lambda path: family_of(str(path), config=str(path)),
    "published": lambda path: read_pickle(path, ["0" * 64], what="LPIPS"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path: Path, proof: Path, reader: str, ending: str) -> None:
    for kind in KINDS:
        path = tmp_path / f"x{ending}"
        path.write_bytes(payload(proof, kind))
        refused(partial(READERS[reader], path), tmp_path, proof)


@pytest.mark.parametrize("ending", ENDINGS[:-1])
def test_a_folder_of_pickles_is_refused(tmp_path: Path, proof: Path, ending: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("pytorch_model", "diffusion_pytorch_model", "pytorch_lora_weights", "learned_embeds"):
        (folder / f"{name}{ending}").write_bytes(payload(proof, "zip"))
    refused(lambda: find_artefact(str(folder)), tmp_path, proof)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    refused(lambda: find_artefact(str(folder)), tmp_path, proof)


PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("part", PARTS)
def test_a_model_whose_weights_are_pickled_is_refused(model: Path, proof: Path, part: str) -> None:
    stem = PARTS[part]
    (model / part / f"{stem}.safetensors").unlink()
    for name in (stem, "pytorch_model"):
        (model / part / f"{name}.bin").write_bytes(payload(proof, "zip"))
    assert "pickle" in refused(lambda: load_family(str(model)), model, proof)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("harmless", [False, True], ids=["malicious", "harmless"])
def test_an_index_of_shards_that_names_a_pickle_is_refused(model: Path, proof: Path, part: str, harmless: bool) -> None:
    """The weights of the index are looked for in `evil.bin`; a safetensors file lies beside it for show."""
    stem = PARTS[part]
    whole = model / part / f"{stem}.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(whole)
    whole.unlink()
    save_file({"show": torch.ones(1)}, model / part / "show.safetensors")
    evil = model / part / "evil.bin"
    if harmless:
        torch.save(tensors, evil)
    else:
        evil.write_bytes(payload(proof, "zip"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "evil.bin")}
    (model / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: load_family(str(model)), model, proof)


@pytest.mark.parametrize(
    "cls", ["OnnxRuntimeModel", "DiffusionPipeline", "AutoPipelineForText2Image", "FlaxUNet2DConditionModel"]
)
def test_an_index_that_names_another_class_reads_no_pickle(model: Path, proof: Path, cls: str) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", cls]}))
    for name in ("diffusion_pytorch_model.bin", "model.onnx", "diffusion_flax_model.msgpack"):
        (model / "vae" / name).write_bytes(payload(proof, "zip"))
    refused(lambda: load_family(str(model)), model, proof)


def test_a_custom_pipeline_in_a_model_is_not_run(model: Path, proof: Path) -> None:
    code = f"open({str(proof)!r}, 'w').write('code was run')"
    for name in ("pipeline.py", "unet/unet.py", "modeling_clip.py"):
        (model / name).write_text(code)
    index = json.loads((model / "model_index.json").read_text())
    for changed in (
        {"_class_name": ["pipeline", "StableDiffusionPipeline"]},
        {"unet": ["unet", "UNet2DConditionModel"]},
        {"unet": ["../unet", "UNet2DConditionModel"]},
    ):
        (model / "model_index.json").write_text(json.dumps({**index, **changed}))
        refused(lambda: load_family(str(model)), model, proof)
    (model / "model_index.json").write_text(json.dumps(index))
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_clip.CLIPTextModel"}
    (model / "text_encoder" / "config.json").write_text(json.dumps(config))
    ordeal.endure("pickles", lambda: load_family(str(model)), writes=model)
    assert not proof.exists()


def test_a_clip_of_pickles_is_refused(tmp_path: Path, proof: Path) -> None:
    from transformers import CLIPModel

    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "pytorch_model.bin").write_bytes(payload(proof, "zip"))
    refused(lambda: _read(CLIPModel, str(tmp_path), use_safetensors=True), tmp_path, proof)


def test_within_no_pickles_torch_reads_none_and_after_it_does(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    with no_pickles(), pytest.raises(OSError, match="not read"):
        torch.load(tmp_path / "x.bin", weights_only=True)
    assert torch.load(tmp_path / "x.bin", weights_only=True)["a"] == 1
    with pytest.raises(UserError, match="never read"):
        read_pickle(tmp_path / "x.bin", ["0" * 8], what="LPIPS")
