"""Weights from outside: safetensors with absurd headers, LoRAs, deltas, checkpoints, model folders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import CHANGES, CUTS, changed, cut, json_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from ordeal import cases, endure
from safetensors.torch import save_file

from duo.artefacts import find_artefact
from duo.checkpoint import METADATA_KEY, read_tensors, write_tensors
from duo.delta import Delta
from duo.erasures import Composition, Erasure
from duo.errors import UserError
from duo.exporting import export
from duo.families import _erased
from duo.models import denoiser_config, family_of, load_family
from duo.stages.attacking import _Search
from duo.training import _resume, _save
from tiny_single_file import single_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def safetensors_bytes(header: Any, data: bytes, *, length: int | None = None) -> bytes:
    """A file of that header, which may say anything; `length` is what the file says of it, the truth where None."""
    text = header if isinstance(header, bytes) else json_bytes(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


# Of a safetensors file: its header's fields, with what only such a header has; or its bytes.
OWN = st.sampled_from(
    (
        "F4",
        "F8_E4M3",
        "F8_E8M0",
        "BF16",
        "F16",
        "F64",
        "C64",
        "I64",
        "U64",
        "BOOL",
        [2**40, 2**40],
        [2**63],
        [-1],
        [0, 2**62],
        [1] * 200,
        [8, 0],
        [0, 0],
        [0, 2**63],
        [2**64 - 8, 2**64],
        [4, 12],
        [16, 8],
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    )
)
KINDS = ("float16", "bfloat16", "float64", "int64", "bool", "float8_e4m3fn", "complex64", "uint8")
HEADER = st.one_of(
    st.tuples(st.just("fields"), CHANGES),
    st.tuples(st.just("own"), st.lists(st.tuples(st.integers(0, 2**20), OWN), min_size=1, max_size=2)),
    st.tuples(st.just("length"), st.sampled_from((0, 1, 2**20, 2**32, 2**63, 2**64 - 1))),
    st.tuples(st.just("record"), CHANGES),
    st.tuples(st.just("dtype"), st.sampled_from(KINDS)),
    st.tuples(st.just("shape"), st.sampled_from(("flat", "empty", "scalar", "more", "turned", "nan"))),
    st.tuples(st.just("bytes"), CUTS),
)


def damaged(data: bytes, damage: tuple[str, Any]) -> bytes:
    kind, how = damage
    if kind == "bytes":
        return cut(data, how)
    if kind == "length":
        header, rest = parts(data)
        return safetensors_bytes(header, rest, length=how)
    if kind in ("dtype", "shape"):
        from safetensors.torch import load, save

        header, _ = parts(data)
        tensors = {name: _other(one, kind, how) for name, one in load(data).items()}
        return save(tensors, metadata=header.get("__metadata__"))
    header, rest = parts(data)
    if kind == "fields":
        header = changed(header, how)
    elif kind == "own":
        names = [name for name in header if name != "__metadata__"]
        for where, value in how:
            field = ("dtype", "shape", "data_offsets")[where % 3]
            header[names[where // 3 % len(names)]][field] = value
    else:
        record = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
        header.setdefault("__metadata__", {})[METADATA_KEY] = json_bytes(changed(record, how)).decode()
    return safetensors_bytes(header, rest)


def _other(tensor: torch.Tensor, kind: str, how: str) -> torch.Tensor:
    if kind == "dtype":
        return tensor.to(getattr(torch, how))
    new = {
        "flat": tensor.flatten(),
        "empty": tensor.flatten()[:0],
        "scalar": tensor.flatten()[0],
        "more": tensor[None],
        "turned": tensor.T if tensor.dim() == 2 else tensor,
        "nan": tensor * float("nan") if tensor.is_floating_point() else tensor,
    }[how]
    return new.contiguous().clone()


# --- reading ---------------------------------------------------------------------------------------


@cases("tensors")
@given(HEADER)
def test_tensors_are_read_or_refused(folder: Path, damage: Any) -> None:
    whole = folder / "whole.safetensors"
    if not whole.exists():
        write_tensors(whole, {"a": torch.ones(2, 3), "b": torch.ones(1)}, {"step": 1})
    path = folder / "x.safetensors"
    path.write_bytes(damaged(whole.read_bytes(), damage))
    endure("tensors", lambda: read_tensors(path), writes=folder)
    endure("tensors", lambda: family_of(str(path)), writes=folder)


def _delta(kind: str) -> Delta:
    layer = "down_blocks.0.attentions.0.to_k"
    low_rank = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(3, 2)}
    tensors = {
        "lora": low_rank,
        "weights": {f"{layer}.weight.diff": torch.ones(3, 4)},
        "gated": {"0.gate.embeds": torch.ones(1, 5, 4), **{f"0.{name}": one for name, one in low_rank.items()}},
    }[kind]
    record: dict[str, Any] = {
        "model": "toybox",
        "method": "duo",
        "config": {"rank": 2},
        "seed": 0,
        "base": {layer: "0" * 64},
    }
    if kind == "gated":
        record["gates"] = [{"concepts": ["fire"], "token_ids": [[1, 2]]}]
    return Delta(kind=kind, component="unet", tensors=tensors, record=record)


@cases("delta")
@given(st.sampled_from(("lora", "weights", "gated")), HEADER)
def test_a_delta_is_read_or_refused(folder: Path, kind: str, damage: Any) -> None:
    whole = folder / f"{kind}.safetensors"
    if not whole.exists():
        _delta(kind).save(whole)
    path = folder / "delta.safetensors"
    path.write_bytes(damaged(whole.read_bytes(), damage))

    def use() -> None:
        delta = Delta.load(path)
        assert delta.layers() is not None
        Composition.read([path], [0.5])
        Erasure.read(path)

    endure("delta", use, writes=folder)
    (folder / "out.safetensors").unlink(missing_ok=True)
    endure("delta", lambda: export(path, folder / "out.safetensors", to="kohya"), writes=folder)


@cases("artefact")
@given(st.sampled_from(("file", "folder", "config")), HEADER, CHANGES)
def test_an_artefact_is_recognised_or_refused(folder: Path, kind: str, damage: Any, changes: Any) -> None:
    place = folder / "artefact"
    place.mkdir(exist_ok=True)
    whole = folder / "unet.safetensors"
    if not whole.exists():
        save_file({"down_blocks.0.resnets.0.conv1.weight": torch.ones(2, 2)}, whole)
    (place / "config.json").unlink(missing_ok=True)
    if kind == "config":
        (place / "config.json").write_bytes(
            json_bytes(changed({"_class_name": "UNet2DConditionModel", "x": [1]}, changes))
        )
    path = place / "model.safetensors"
    path.write_bytes(damaged(whole.read_bytes(), damage))
    endure("artefact", lambda: find_artefact(str(path if kind == "file" else place)), writes=folder)


# --- checkpoints and searches ----------------------------------------------------------------------


@cases("checkpoint")
@given(HEADER)
def test_training_goes_on_from_a_checkpoint_or_refuses(folder: Path, damage: Any) -> None:
    place = folder / "checkpoints"
    place.mkdir(exist_ok=True)

    def begin() -> tuple[Any, Any, Any]:
        parameters = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))])
        return parameters, torch.optim.AdamW(parameters, lr=0.1), torch.Generator().manual_seed(0)

    parameters, optimizer, generator = begin()
    sum(one.sum() for one in parameters).backward()
    optimizer.step()
    _save(place, 1, parameters, optimizer, generator, {"model": "tiny", "steps": [1, 2]})
    (path,) = place.glob("*.safetensors")
    path.write_bytes(damaged(path.read_bytes(), damage))

    def go_on() -> None:
        parameters, optimizer, generator = begin()
        _resume(place, parameters, optimizer, generator, {"model": "tiny", "steps": [1, 2]}, {})
        sum(one.sum() for one in parameters).backward()
        optimizer.step()
        torch.rand(1, generator=generator)

    endure("checkpoint", go_on, writes=place)


@cases("search")
@given(HEADER)
def test_what_an_attack_found_is_read_or_refused(folder: Path, damage: Any) -> None:
    whole = folder / "search" / "whole.safetensors"
    if not whole.exists():
        attempt = {"prompt": "<c> a", "negative_prompt": None, "variant": "", "strength": 0.5, "weights": "relearned-1"}
        record = {
            "attempts": [{**attempt, "unloaded": False, "record": {}}],
            "base_prompt": "a",
            "refused": [],
            "queries": 1,
        }
        picture = torch.zeros(4, 4, 3, dtype=torch.uint8)
        write_tensors(whole, {"0.token.<c>": torch.ones(1, 8), "0.init": picture, "0.source": picture + 1}, record)
    path = folder / "search" / "0000.safetensors"
    path.write_bytes(damaged(whole.read_bytes(), damage))

    def read() -> None:
        for one in _Search.load(path).attempts:
            assert isinstance(one.prompt, str)
            assert one.weights is None or Path(one.weights).name == one.weights

    endure("search", read, writes=folder)


# --- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(make_tiny_pipeline: Any, folder: Path) -> dict[str, Path]:
    """A LoRA as diffusers names it and as kohya does, a denoiser, a text encoder and a whole checkpoint."""
    pipeline = make_tiny_pipeline()
    unet, encoder = pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()
    keys = [name.removesuffix(".weight") for name in unet if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    words = [name.removesuffix(".weight") for name in encoder if name.endswith("q_proj.weight")]

    def lora(layer: str, weight: torch.Tensor, down: str, up: str) -> dict[str, torch.Tensor]:
        return {
            f"{layer}.{down}.weight": torch.ones(1, weight.shape[1]),
            f"{layer}.{up}.weight": torch.ones(weight.shape[0], 1),
        }

    made: dict[str, dict[str, torch.Tensor]] = {"diffusers": {}, "kohya": {}, "denoiser": unet, "text_encoder": encoder}
    for layer in keys:
        made["diffusers"] |= lora(f"unet.{layer}", unet[f"{layer}.weight"], "lora_A", "lora_B")
        named = f"lora_unet_{layer.replace('.', '_')}"
        made["kohya"] |= lora(named, unet[f"{layer}.weight"], "lora_down", "lora_up") | {
            f"{named}.alpha": torch.tensor(1.0)
        }
    for layer in words:
        made["diffusers"] |= lora(f"text_encoder.{layer}", encoder[f"{layer}.weight"], "lora_A", "lora_B")
    made["single"] = single_file(pipeline)
    paths = {}
    for name, tensors in made.items():
        paths[name] = folder / "files" / f"{name}.safetensors"
        paths[name].parent.mkdir(exist_ok=True)
        save_file({key: one.clone().contiguous() for key, one in tensors.items()}, paths[name])
    return paths


PREFIXES = (
    *("", "x", "unet.", "unet.x.lora_A.weight", "text_encoder_2.x.lora_A.weight", "lora_te_x.lora_down.weight"),
    *("a.alpha", "a.dora_scale", "é\u202e", "..", "a" * 5000),
)
# In a header: tensors renamed, left out or exchanged, so that the file itself is sound.
NAMES = st.one_of(
    HEADER,
    st.tuples(
        st.just("rename"), st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(PREFIXES)), min_size=1, max_size=3)
    ),
)


def renamed(data: bytes, damage: tuple[str, Any]) -> bytes:
    kind, how = damage
    if kind != "rename":
        return damaged(data, damage)
    header, rest = parts(data)
    for where, new in how:
        names = [name for name in header if name != "__metadata__"]
        old = names[where % len(names)]
        header[new + (old if where % 2 else "")] = header.pop(old)
    return safetensors_bytes(header, rest)


def put_together(kind: str, source: Path, make_tiny_pipeline: Any) -> None:
    from duo.families.sd import Sd

    base = Sd(make_tiny_pipeline(), name="tiny")
    find_artefact(str(source))
    _erased.build(kind, source, base, name="erased")


@cases("LoRA")
@example("diffusers", ("shape", "flat"))
@given(st.sampled_from(("diffusers", "kohya")), NAMES)
def test_a_lora_is_put_in_or_refused(folder: Path, files: Any, make_tiny_pipeline: Any, kind: str, damage: Any) -> None:
    path = folder / "lora.safetensors"
    path.write_bytes(renamed(files[kind].read_bytes(), damage))
    endure("LoRA", lambda: put_together("lora", path, make_tiny_pipeline), writes=folder)


@cases("weights")
@given(st.sampled_from(("denoiser", "text_encoder")), NAMES)
def test_weights_are_taken_over_or_refused(
    folder: Path, files: Any, make_tiny_pipeline: Any, kind: str, damage: Any
) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(renamed(files[kind].read_bytes(), damage))
    endure("weights", lambda: put_together(kind, path, make_tiny_pipeline), writes=folder)


def test_sound_files_are_taken(folder: Path, files: Any, make_tiny_pipeline: Any) -> None:
    kinds = {"diffusers": "lora", "kohya": "lora", "denoiser": "denoiser", "text_encoder": "text_encoder"}
    for name, kind in kinds.items():
        assert endure("weights", lambda: put_together(kind, files[name], make_tiny_pipeline), writes=folder) is None  # noqa: B023


@cases("model folder")
@given(st.integers(0, 2**20), st.one_of(st.tuples(st.just("fields"), CHANGES), st.tuples(st.just("bytes"), CUTS)))
def test_a_model_folder_is_loaded_or_refused(folder: Path, tiny_folder: Path, number: int, damage: Any) -> None:
    model = folder / "model"
    if not model.exists():
        shutil.copytree(tiny_folder, model)
    paths = sorted(path for path in model.rglob("*") if path.suffix in (".json", ".txt"))
    path = paths[number % len(paths)]
    before = path.read_bytes()
    kind, how = damage
    fields = kind == "fields" and path.suffix == ".json"
    path.write_bytes(
        json_bytes(changed(json.loads(before), how)) if fields else cut(before, how if kind == "bytes" else [])
    )
    try:
        endure("model folder", lambda: denoiser_config(str(model), "unet"), writes=folder)
        endure("model folder", lambda: load_family(str(model)), writes=folder)
    finally:
        path.write_bytes(before)


@cases("single file")
@given(NAMES)
def test_a_single_file_is_loaded_or_refused(folder: Path, files: Any, tiny_folder: Path, damage: Any) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(renamed(files["single"].read_bytes(), damage))
    endure("single file", lambda: load_family(str(path), config=str(tiny_folder)), writes=folder)


READERS: dict[str, Callable[[Path], object]] = {
    "tensors": read_tensors,
    "delta": Delta.load,
    "artefact": lambda path: find_artefact(str(path)),
    "model": lambda path: family_of(str(path)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        safetensors_bytes({}, b""),
        safetensors_bytes(b"[" * 100_000, b""),
        safetensors_bytes(b'{"a":' * 50_000, b""),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}, bytes(4)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**40]}}, bytes(4)),
        safetensors_bytes(
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, bytes(4)
        ),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
    ],
    ids=["empty", "short", "endless", "long", "nothing", "deep", "deeper", "vast", "beyond", "overlap", "none of many"],
)
def test_an_absurd_header_is_refused(tmp_path: Path, reader: str, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    refusal = endure("tensors", lambda: READERS[reader](path), writes=tmp_path)
    assert isinstance(refusal, UserError) or reader == "tensors"
