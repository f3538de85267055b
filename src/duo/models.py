"""From what the user calls a model to its family: an embedded name, a diffusers folder, a hub id or a checkpoint."""

from __future__ import annotations

import inspect
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
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
# How a key begins, or what follows the denoiser's prefix, that only checkpoints of one pipeline class hold, in the
# order to be tried.
_DENOISER = "model.diffusion_model."
_MARKS = {
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "joint_blocks.": "StableDiffusion3Pipeline",
    "double_blocks.": "FluxPipeline",
}
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
            on = usable_device(device)
            if single and "config" not in inspect.signature(family.load).parameters:
                raise UserError(
                    f"single checkpoints of a {pipeline} are not read; give the diffusers folder of {model!r}"
                )
            of_file = {"config": config} if single else {}
            loaded: plugins.Family = family.load(source, name=model, device=on, dtype=dtype or torch.float32, **of_file)
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
        known = did_you_mean(model, EMBEDDED)
        raise UserError(f"no model is called {model!r}, nor is it a folder, a checkpoint or a hub id{known}")
    return model, _hub_index(model)


def _checkpoint_class(path: Path, config: str | None) -> str:
    """The pipeline class of a single checkpoint: what its keys say, with which `config` must agree."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code and is not read; convert it where that is safe: "
            f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained(NEW_FOLDER)"
        )
    keys = _keys(path)
    denoiser_input = keys.get(f"{_DENOISER}input_blocks.0.0.weight")
    if denoiser_input is not None and denoiser_input[1] != 4:
        raise UserError(f"{path} is no text-to-image model: its U-Net takes {denoiser_input[1]} channels, expected 4")
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
