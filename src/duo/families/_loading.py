"""What every family does to read and write a diffusers pipeline: safetensors only, quietly, nothing made up."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from duo.errors import UserError, first_line
from duo.families._sampling import missing_packages
from duo.sources import PICKLES, no_pickles

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# What a component of a pipeline can be: diffusers also has classes that hand a file to other runtimes.
KINDS = (
    diffusers.ModelMixin,
    diffusers.SchedulerMixin,
    transformers.PreTrainedModel,
    transformers.PreTrainedTokenizerBase,
    transformers.ProcessorMixin,
    transformers.ImageProcessingMixin,
    transformers.FeatureExtractionMixin,
)
HALF = "fp16"  # diffusers' name for the variant of a model's files that is kept in float16


def load_pipeline(
    kind: Any,
    path_or_id: str | Path,
    *,
    name: str,
    dtype: torch.dtype,
    config: str | None = None,
    optional: Collection[str] = (),
    dropped: Collection[str] = (),
    **arguments: Any,
) -> Any:
    """A pipeline of diffusers' class `kind` from a folder, hub id or checkpoint file, on the CPU, safetensors only.

    A checkpoint file holds weights alone: the rest, VAE and text encoders that it lacks included, comes from `config`,
    the folder or hub id of a diffusers model of its kind, or, where None, of the model that diffusers takes the keys
    for. A folder whose networks have files of the variant "fp16" alone is read from these.

    A component of `optional` may be `[null, null]` in the model's index; one of `dropped` is left out whatever the
    index says. `arguments` go to the pipeline's constructor. Raises `UserError` where a component or a weight is
    missing, where a class is unknown, and where weights are pickled. `name` is what the user called the model.
    """
    if Path(path_or_id).is_file():
        return _load_file(
            kind,
            Path(path_or_id),
            name=name,
            dtype=dtype,
            config=config,
            optional=optional,
            dropped=dropped,
            **arguments,
        )
    with _one_line(name), quiet():
        index = kind.load_config(str(path_or_id))
    parts, left_out = _components(kind, index, name=name, optional=optional, dropped=dropped)
    variant = _check_folders(Path(path_or_id), parts) if Path(path_or_id).is_dir() else None
    told: dict[str, list[str]] = {}
    loaded: dict[str, Any] = {}
    with _one_line(name), quiet():
        for part, cls in parts.items():
            if issubclass(cls, transformers.PreTrainedModel):
                loaded[part], told[part] = _load_encoder(cls, path_or_id, part, dtype=dtype)
        pipeline = kind.from_pretrained(
            str(path_or_id), dtype=dtype, variant=variant, use_safetensors=True, **loaded, **left_out, **arguments
        )
    refuse_gaps(pipeline, name=name, told=told)
    return pipeline


def _load_file(
    kind: Any,
    path: Path,
    *,
    name: str,
    dtype: torch.dtype,
    config: str | None,
    optional: Collection[str],
    dropped: Collection[str],
    **arguments: Any,
) -> Any:
    """`load_pipeline` for one .safetensors file in the layout of the model's authors."""
    with _one_line(name):
        keys = _shapes(path)
    source = config or _default_config(keys, name=name)
    try:
        with quiet():
            index = kind.load_config(source)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"model {name!r} is weights alone, and the settings of {source!r} cannot be read ({reason}); "
            "give model_config = a local diffusers folder of the same kind"
        ) from error
    parts, left_out = _components(kind, index, name=source, optional=optional, dropped=dropped)
    told: dict[str, list[str]] = {}
    loaded: dict[str, Any] = {}
    with _one_line(name), quiet(), _unadvised():
        for part, cls in parts.items():
            if issubclass(cls, transformers.PreTrainedModel) and not _holds_encoder(cls, keys):
                loaded[part], told[part] = _load_encoder(cls, source, part, dtype=dtype)
            elif issubclass(cls, diffusers.AutoencoderKL) and not _holds_vae(keys):
                loaded[part] = _load_vae(cls, source, part, dtype=dtype)
            elif issubclass(cls, diffusers.ModelMixin):
                loaded[part] = _load_network(cls, path, part, name=name, dtype=dtype, config=source)
        fixed = {"config": source, **loaded, **left_out, **arguments}
        try:
            pipeline = kind.from_single_file(str(path), dtype=dtype, **fixed)
        except NotImplementedError:  # a text encoder's weight without data cannot be cast: load it as it is, to name it
            refuse_gaps(kind.from_single_file(str(path), **fixed), name=name, told=told)
            raise
    refuse_gaps(pipeline, name=name, told=told)
    predicts = pipeline.scheduler.config.get("prediction_type")
    if "v_pred" in keys and predicts != "v_prediction":  # a mark that authors of v-prediction models put in
        raise UserError(
            f"model {name!r} predicts v (it holds the key 'v_pred'), but the settings of {source!r} say {predicts!r}; "
            'give model_config = a folder whose scheduler_config.json has prediction_type "v_prediction"'
        )
    return pipeline


def _load_network(cls: Any, path: Path, part: str, *, name: str, dtype: torch.dtype, config: str) -> Any:
    """A network of diffusers from a checkpoint file; on its own, for only so is it known where weights are missing."""
    try:
        return cls.from_single_file(str(path), config=config, subfolder=part, dtype=dtype)
    # A weight without data cannot be moved, and diffusers does not say which; or its converter looked for it in vain.
    except (NotImplementedError, KeyError, single_file_utils.SingleFileComponentError) as error:
        raise UserError(f"model {name!r}: the weights of {part} are not all in the file; restore it") from error


def _load_encoder(cls: Any, path_or_id: str | Path, part: str, *, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """A network of transformers, and the weights that it had to make up: told only where it is loaded on its own."""
    variant = _variant(_files(Path(path_or_id) / part))
    encoder, info = cls.from_pretrained(
        str(path_or_id), subfolder=part, dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
    )
    return encoder, sorted(info["missing_keys"])


def _load_vae(cls: Any, path_or_id: str | Path, part: str, *, dtype: torch.dtype) -> Any:
    variant = _variant(_files(Path(path_or_id) / part))
    return cls.from_pretrained(str(path_or_id), subfolder=part, dtype=dtype, variant=variant, use_safetensors=True)


def _shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their data."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _default_config(keys: dict[str, Tensor], *, name: str) -> str:
    """The hub id of the model that diffusers takes the keys for."""
    if any(key.startswith("cond_stage_model.model.") for key in keys):
        raise UserError(
            f"model {name!r} is an SD 2.x checkpoint, and its keys do not tell whether it predicts ε or v; give "
            "model_config = the folder or hub id of a diffusers model with its settings"
        )
    return str(single_file_utils.fetch_diffusers_config(keys)["pretrained_model_name_or_path"])


def _holds_encoder(cls: type, keys: dict[str, Tensor]) -> bool:
    if issubclass(cls, transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection):
        return bool(single_file_utils.is_clip_model_in_single_file(cls, keys))
    return issubclass(cls, transformers.T5EncoderModel) and bool(single_file_utils.is_t5_in_single_file(keys))


def _holds_vae(keys: dict[str, Tensor]) -> bool:
    """Files of FLUX hold the transformer alone."""
    return any(key.startswith(tuple(single_file_utils.LDM_VAE_KEYS)) for key in keys)


def refuse_gaps(pipeline: Any, *, name: str, told: dict[str, list[str]] | None = None) -> None:
    """Raise `UserError` where a network of the pipeline lacks a weight: `told` by its loader, or left without data."""
    missing = dict(told or {})
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module) and not missing.get(part):  # diffusers leaves gaps on the meta device
            missing[part] = [key for key, value in module.named_parameters() if value.is_meta]
    for part, keys in missing.items():
        if keys:
            raise UserError(f"model {name!r}: the weights of {part} lack {keys[0]}; restore the file")


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write the pipeline under `folder`, which must not exist yet, by renaming a temporary neighbour."""
    if folder.exists():
        raise UserError(f"{folder} exists already; name a new folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        with quiet():
            pipeline.save_pretrained(temporary, safe_serialization=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def freeze(modules: Iterable[nn.Module | None]) -> None:
    """No gradients for the weights, and evaluation mode."""
    for module in modules:
        if module is not None:
            module.requires_grad_(False).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading bars of diffusers and transformers, and put back what was set."""
    were_on = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in were_on:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in were_on:
            log.enable_progress_bar()


@contextmanager
def _unadvised() -> Iterator[None]:
    """Drop diffusers' advice on its own cast of a single file's weights, which nobody here can follow."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("There are modules in ")

    logger = logging.getLogger("diffusers.models.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what the loaders raise for files that are missing, damaged or of another network into a `UserError`."""
    try:
        with no_pickles():
            yield
    except ImportError as error:
        raise UserError(f"model {name!r} cannot be loaded here: {first_line(error)}") from error
    except (
        AttributeError,
        TypeError,
        KeyError,
        StrictDataclassError,
    ) as error:  # a setting missing, or of another type
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"model {name!r}: a configuration file of it cannot be used ({told}); restore it") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model {name!r} cannot be loaded as safetensors: {first_line(error)}") from error


def _parameters(kind: Any) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(kind.__init__).parameters)
    del parameters["self"]
    return parameters


def _components(
    kind: Any, index: dict[str, Any], *, name: str, optional: Collection[str], dropped: Collection[str]
) -> tuple[dict[str, type], dict[str, None]]:
    """The class of each component that the index names, and those of `dropped` and `optional` that are left out.

    `UserError` where one that `kind` needs is not named.
    """
    parts: dict[str, type] = {}
    for part, parameter in _parameters(kind).items():
        entry = index.get(part)
        if part in dropped or (parameter.default is not parameter.empty and not isinstance(entry, list)):
            continue
        library, cls = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        if cls is None:
            if part in optional or parameter.default is not parameter.empty:
                continue
            raise UserError(f"model {name!r}: model_index.json names no {part}; restore the entry and its folder")
        found = getattr(LIBRARIES.get(str(library)), str(cls), None)
        if not isinstance(found, type):
            raise UserError(
                f"model {name!r}: model_index.json gives {part} the class {library}.{cls}, which is unknown here; "
                "name one of the installed diffusers or transformers"
            )
        if lacking := missing_packages(found):
            raise UserError(
                f"model {name!r}: model_index.json gives {part} the class {cls}, which needs {lacking}; install it, or "
                "name another class"
            )
        if not issubclass(found, KINDS):
            raise UserError(
                f"model {name!r}: model_index.json gives {part} the class {library}.{cls}, which is no network, "
                "scheduler, tokenizer or processor; restore it"
            )
        parts[part] = found
    left_out = [part for part in (*dropped, *optional) if part in _parameters(kind) and part not in parts]
    return parts, dict.fromkeys(left_out)


def _check_folders(folder: Path, parts: dict[str, type]) -> str | None:
    """The variant that a model's files are read in: "fp16" where its networks have no other, else None.

    Raises `UserError` where a component's folder lacks what its class is read from, or the networks' variants differ.
    """
    found: dict[str | None, Path] = {}
    for part, cls in parts.items():
        files = _files(folder / part)
        if issubclass(cls, nn.Module):
            if not any(path.suffix == ".safetensors" for path in files):
                raise UserError(f"{folder / part} holds no .safetensors weights; {_how_to_convert(folder, files)}")
            found[_variant(files)] = folder / part
        elif issubclass(cls, transformers.PreTrainedTokenizerBase):  # transformers would make an empty one
            if not any(path.suffix in (".json", ".model") for path in files):
                raise UserError(f"{folder / part} holds no tokenizer; restore it")
        elif not any(path.suffix == ".json" for path in files):
            raise UserError(f"{folder / part} holds no configuration of a {cls.__name__}; restore it")
    if len(found) > 1:
        raise UserError(
            f"{found[HALF]} holds weights of the variant {HALF} alone, but {found[None]} has others; "
            "give all networks the same"
        )
    return HALF if HALF in found else None


def _variant(files: Collection[Path]) -> str | None:
    """ "fp16" where a network has weights of that variant alone, whole or in shards."""
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    return HALF if weights and all(re.search(rf"\.{HALF}[.-]", name) for name in weights) else None


def _how_to_convert(folder: Path, files: Collection[Path]) -> str:
    pickle = next((path for suffix in PICKLES for path in files if path.suffix == suffix), None)
    if pickle is None:
        return "restore them"
    return (
        f"{pickle.name} is a pickle, which can run code and is not read; convert the model where that is safe: "
        f"DiffusionPipeline.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained(NEW_FOLDER)"
    )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
