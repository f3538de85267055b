"""Training state as one safetensors file: weights, AdamW moments, the generator, the step. Nothing is pickled.

A run that is resumed from a checkpoint takes the same steps, bit for bit on one machine, as one that was never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duo.errors import UserError

METADATA_KEY = "duo"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
    """Write `tensors` with `record` as canonical JSON under one metadata key, to a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    metadata = {METADATA_KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(
    path: Path, *, todo: str = "remove it, and make it again"
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a file of `write_tensors` and its record (empty for a file made by other software).

    Raises `UserError` where the file is missing or damaged; `todo` is what it tells the user to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        record = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); {todo}") from error
    return tensors, record


def save_training_state(
    path: Path,
    *,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    record: Mapping[str, object] | None = None,
) -> None:
    """Write everything that `load_training_state` needs: whole state dicts, so pass modules of what is trained."""
    tensors = {"generator": generator.get_state()}
    for name, module in modules.items():
        for key, parameter in module.state_dict().items():
            tensors[f"module.{name}.{key}"] = parameter
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    # Tensors may share storage (tied weights), which safetensors refuses; a clone is cheap at a checkpoint.
    write_tensors(path, {k: v.clone() for k, v in tensors.items()}, {"step": step, **(record or {})})


def load_training_state(
    path: Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[int, dict[str, object]]:
    """Restore what `save_training_state` wrote, strictly, and return the step and the record."""
    tensors, record = read_tensors(path)
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    return int(record["step"]), record  # type: ignore[call-overload]
