"""Training state as one safetensors file: weights, AdamW moments, the generator, the step. Nothing is pickled.

A run that is resumed from a checkpoint takes the same steps, bit for bit on one machine, as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duo.errors import UserError
from duo.foreign import json_value

METADATA_KEY = "duo"
DIGEST = "sha256"  # of the tensors, in the record: a file that is read again before a manifest seals it is checked too


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
    """Write `tensors` with `record` as canonical JSON under one metadata key, to a temporary name and renamed.

    Their digest is written with them. A disk that is full is an `OSError`, as of any other file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    told = {**record, DIGEST: _digest(written)}
    metadata = {METADATA_KEY: json.dumps(told, sort_keys=True, separators=(",", ":"))}
    try:
        save_file(written, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_tensors(
    path: Path, *, todo: str = "remove it, and make it again"
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors of a file of `write_tensors` and its record (empty for a file made by other software).

    Raises `UserError` where the file is missing or damaged, or has other tensors than were written; `todo` is what it
    tells the user to do.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        record = json_value(metadata.get(METADATA_KEY, "{}"))
        if not isinstance(record, dict):
            raise ValueError(f"its record is a {type(record).__name__}, expected an object")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); {todo}") from error
    wanted = record.pop(DIGEST, None) if isinstance(record, dict) else None  # older versions of duo wrote none
    if wanted is not None and wanted != _digest(tensors):
        raise UserError(f"{path} is damaged: its tensors are not those that were written; {todo}")
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
    """Restore what `save_training_state` wrote, strictly, and return the step and the record.

    Raises `RuntimeError`, `LookupError`, `TypeError` or `ValueError` where the file is of other modules, or of none.
    """
    tensors, record = read_tensors(path)
    step = record["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}")
    for name, module in modules.items():
        prefix = f"module.{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    _check_moments(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    return step, record


def _check_moments(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Raise `ValueError` where moments are of other parameters: the optimiser would find that out in its next step."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    if not {*state} <= {*range(len(parameters))}:
        raise ValueError(f"it has moments of {len(state)} parameters, and there are {len(parameters)}")
    for index, moments in state.items():
        for key, value in moments.items():
            if value.dim() and value.shape != parameters[index].shape and key.startswith("exp_avg"):
                raise ValueError(f"{key} of parameter {index} is {tuple(value.shape)}")
