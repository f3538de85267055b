"""From what the user calls a model to its family: an embedded name, a diffusers folder or a hub id."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo import plugins
from duo.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

EMBEDDED = ("toybox", "toybox-never-fire")
INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def usable_device(device: torch.device | str) -> torch.device:
    """`device` as torch has it, or a `UserError` where it is no device or none that holds numbers here."""
    import torch

    try:
        torch.ones(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was built for CUDA
        reason = (str(error).strip() or "there is none").splitlines()[0]
        raise UserError(f"--device {device}: {reason}; give one that this machine has, such as cpu") from error


def load_family(model: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> plugins.Family:
    """Load `model` as the family that serves its pipeline class, in `dtype` (float32 where None).

    Raises `UserError` where there is no such model, where it is no diffusers pipeline, or where no family serves it.
    """
    import torch

    # transformers advises to install torchvision, which nothing here needs.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    source, index = _locate(model)
    pipeline = _pipeline_class(index)
    supported: set[str] = set()
    for name in plugins.names("families"):
        family: Any = plugins.load("families", name)
        if pipeline in family.pipelines:
            on = usable_device(device)
            loaded: plugins.Family = family.load(source, name=model, device=on, dtype=dtype or torch.float32)
            return loaded
        supported |= family.pipelines
    raise UserError(f"model {model!r} is a {pipeline}; supported are {', '.join(sorted(supported))}")


def _locate(model: str) -> tuple[str, Path]:
    """What `from_pretrained` is to be given, and the path of the model's index file."""
    if model in EMBEDDED:
        folder = Path(__file__).parent / "toybox" / "weights" / model
        if not (folder / INDEX).is_file():
            raise UserError(f"the embedded model {model!r} is not in this installation; `duo toybox train` makes it")
        return str(folder), folder / INDEX
    folder = Path(model).expanduser()
    if folder.exists():
        if not (folder / INDEX).is_file():
            raise UserError(
                f"{model or 'model is empty, and the folder here'} is not a diffusers model: it has no {INDEX}"
            )
        return str(folder), folder / INDEX
    if not _HUB_ID.fullmatch(model):
        raise UserError(f"no model is called {model!r}, nor is it a folder or a hub id{did_you_mean(model, EMBEDDED)}")
    return model, _hub_index(model)


def _hub_index(model: str) -> Path:
    """The index file of a hub model, from the cache or, unless HF_HUB_OFFLINE is set, from the hub."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, INDEX))
    except (OSError, ValueError) as error:  # every error of the hub client is one of these
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model!r} is neither a folder nor a model that the hub client can get: {reason}") from error


def _pipeline_class(index: Path) -> str:
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{index} cannot be read as JSON: {error}") from error
    if not isinstance(name, str):
        raise UserError(f"{index} names no pipeline class (_class_name)")
    return name
