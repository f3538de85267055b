"""From what the user calls a model to its family: an embedded name, a diffusers folder, a hub id or a checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo import plugins
from duo.errors import UserError, did_you_mean, first_line
from duo.foreign import json_value, read_text
from duo.sources import PICKLES, hub_file, is_hub_id

if TYPE_CHECKING:
    import torch

EMBEDDED = ("toybox", "toybox-never-fire")
INDEX = "model_index.json"
LONGEST_REASON = 160  # characters of what torch says of a device
# How a key begins, or what follows the denoiser's prefix, that only checkpoints of one pipeline class hold, in the
# order to be tried.
_DENOISER = "model.diffusion_model."
_MARKS = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
    "double_blocks.": "FluxPipeline",
}


def written_out(model: str) -> str:
    """What the user calls a model, as records keep it: a path on this machine in full, so that it holds in any folder.

    Links are kept, for those of the hub client's cache lead to files without names.
    """
    path = Path(model).expanduser()
    local = model and model not in EMBEDDED and path.exists()
    return os.path.normpath(path.absolute()) if local else model


def title(model: str) -> str:
    """What pages and cards call a model: the last part of a path, without this machine's other folders."""
    return Path(model).name if Path(model).is_absolute() else model


def usable_device(device: torch.device | str) -> torch.device:
    """`device` as torch has it, or a `UserError` where it is no device or none that holds numbers here."""
    import torch

    try:
        torch.ones(1, device=device).item()
        usable = torch.device(device)
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was built for CUDA
        told = first_line(error)
        told = told if len(told) <= LONGEST_REASON else told[: LONGEST_REASON - 1] + "…"  # torch lists its backends
        raise UserError(f"--device {device}: {told}; give one that this machine has, such as cpu") from error
    if usable.type == "cpu" and usable.index:  # torch takes any number, and there is one
        raise UserError(f"--device {device}: there is no such CPU; give one that this machine has, such as cpu")
    return usable


def load_family(
    model: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: str | None = None,
) -> plugins.Family:
    """Load `model` as the family that serves its pipeline class, in `dtype` (float32 where None).

    A single .safetensors checkpoint holds no settings: they come from `config`, the folder or hub id of a diffusers
    model of the same kind, or from the model that the checkpoint's keys point to. Raises `UserError` where there is no
    such model, where it is none that can be read, or where no family serves it.
    """
    import torch

    # transformers advises to install torchvision, which nothing here needs.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    family, source = _find(model, config)
    on = usable_device(device)
    of_file = {"config": config} if Path(source).is_file() else {}
    name = written_out(model)
    loaded: plugins.Family = family.load(source, name=name, device=on, dtype=dtype or torch.float32, **of_file)
    return loaded


def family_of(model: str, *, config: str | None = None) -> Any:
    """The class of the family that serves `model`, as `load_family` finds it; no weights are read."""
    return _find(model, config)[0]


def denoiser_config(model: str, component: str, *, config: str | None = None) -> dict[str, Any]:
    """The config of a model's denoiser, which its pipeline calls `component`.

    Empty for a single checkpoint without `config`: such files are in the layout of their authors' own networks.
    """
    if Path(model).expanduser().is_file():
        return {} if config is None else denoiser_config(config, component)
    source, index = _locate(model)
    path = index.parent / component / "config.json"
    if hub_id(source) is not None and not path.is_file():
        path = hub_file(model, f"{component}/config.json", kind="a model", give="a local folder by --model")
    try:
        found: dict[str, Any] = json_value(read_text(path))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, expected an object")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    return found


def hub_id(model: str) -> str | None:
    """`model` where it is the id of a hub model, which others can look up; None for what is embedded or a file here."""
    local = model in EMBEDDED or Path(model).expanduser().exists()
    return None if local or not is_hub_id(model) else model


def local_folder(model: str) -> Path | None:
    """Where a model's folder lies on this machine, for a hub model in the cache; no network is asked.

    None for a single checkpoint, and where there is no folder.
    """
    if hub_id(model) is not None:
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(model, INDEX)
        return Path(index).parent if isinstance(index, str) else None
    folder = _embedded(model) if model in EMBEDDED else Path(model).expanduser()
    return folder if (folder / INDEX).is_file() else None


def _find(model: str, config: str | None) -> tuple[Any, str]:
    """The family's class, and what its `load` is to be given."""
    path = Path(model).expanduser()
    single = path.is_file()
    if config is not None and not single:
        raise UserError(f"model_config = {config!r} is for a single checkpoint, and {model!r} is none; leave it out")
    if single:
        source, pipeline = str(path), _checkpoint_class(path, config)
    else:
        source, index = _locate(model)
        pipeline = _pipeline_class(index)
    supported: set[str] = set()
    for name in plugins.names("families"):
        family: Any = plugins.load("families", name)
        if pipeline in family.pipelines:
            return family, source
        supported |= family.pipelines
    raise UserError(f"model {model!r} is a {pipeline}; supported are {', '.join(sorted(supported))}")


def _embedded(model: str) -> Path:
    return Path(__file__).parent / "toybox" / "weights" / model


def _locate(model: str) -> tuple[str, Path]:
    """What `from_pretrained` is to be given, and the path of the model's index file."""
    if model in EMBEDDED:
        folder = _embedded(model)
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
    if not is_hub_id(model):
        known = did_you_mean(model, EMBEDDED)
        raise UserError(f"no model is called {model!r}, nor is it a folder, a checkpoint or a hub id{known}")
    return model, hub_file(model, INDEX, kind="a model", give="a local folder by --model")


def _checkpoint_class(path: Path, config: str | None) -> str:
    """The pipeline class of a single checkpoint: what its keys say, with which `config` must agree."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code and is not read; convert it where that is safe: "
            f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained(NEW_FOLDER)"
        )
    keys = _keys(path)
    denoiser_input = keys.get(f"{_DENOISER}input_blocks.0.0.weight")
    if denoiser_input is not None and denoiser_input[1:2] != [4]:
        told = f"{denoiser_input[1]} channels" if len(denoiser_input) > 1 else "no image"
        raise UserError(f"{path} is no text-to-image model: its U-Net takes {told}, expected 4 channels")
    marked = next(
        (cls for mark, cls in _MARKS.items() if any(key.removeprefix(_DENOISER).startswith(mark) for key in keys)), None
    )
    if marked is None:
        raise UserError(
            f"{path} holds the keys of no checkpoint that is known here ({', '.join(_MARKS.values())}), such as a LoRA "
            "or a part of a model; give a whole model, or its diffusers folder"
        )
    if config is not None:
        named = _pipeline_class(_locate(config)[1])
        if named != marked:
            raise UserError(f"model_config = {config!r} is a {named}, but {path} is a {marked}; give one of its kind")
    return marked


def _keys(path: Path) -> dict[str, list[int]]:
    """The names and shapes of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a .safetensors checkpoint: {error}") from error


def _pipeline_class(index: Path) -> str:
    try:
        name = json_value(read_text(index)).get("_class_name")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{index} cannot be read as JSON: {error}") from error
    if not isinstance(name, str):
        raise UserError(f"{index} names no pipeline class (_class_name)")
    return name
