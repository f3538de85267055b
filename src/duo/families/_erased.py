"""Models that other software erased, made of the original and what was released: a LoRA, or weights of its networks.

The LoRA goes through diffusers' own loaders, fused and unloaded, so that the model is the one that its users have.
Everything else is taken over strictly: a name or shape that the original has not is refused, never skipped, for an
erasure that is half loaded would be audited as if it had failed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from duo.checkpoint import read_tensors
from duo.errors import UserError, first_line
from duo.families._diffusers import DiffusersFamily
from duo.families._loading import quiet
from duo.plugins import Family
from duo.sources import no_pickles

WEIGHTS = ".safetensors"
# How the names of a denoiser begin in its authors' own code, and the prefix that they have in whole checkpoints.
AUTHORS = ("input_blocks.", "middle_block.", "output_blocks.", "joint_blocks.", "double_blocks.", "single_blocks.")
AUTHORS_PREFIX = "model.diffusion_model."
# What a text encoder's file may hold that the pipeline's encoder has no use for: CLIP's other half, old buffers.
UNUSED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
HALVES = (torch.float16, torch.bfloat16)
# What the loaders and converters of diffusers, transformers and peft raise for files that are not as they expect.
FAILURES = (
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
    ImportError,
    StrictDataclassError,
)
OF_ANOTHER = "give the model that was erased as --original"


def build(kind: str, source: Path, base: Family, *, name: str) -> Family:
    """`base` with what `source` holds, as a family called `name`: `kind` is "lora", "denoiser" or "text_encoder".

    `base` is used up: the erased model is made of its networks. Raises `UserError` where they do not go together.
    """
    base = _known(base)
    pipeline = base._pipeline(base._drawing, None)
    if kind == "lora":
        _fuse(pipeline, source, base=base, name=name)
    elif source.is_dir():
        part = base.component if kind == "denoiser" else _encoder_of(pipeline, _shapes_in(source), name=name)
        setattr(pipeline, part, _network(getattr(pipeline, part), source, base=base, name=name))
    else:
        tensors, _ = read_tensors(source, todo="download it again")
        for part, own in _routed(pipeline, tensors, kind, base=base, name=name).items():
            _take_over(getattr(pipeline, part), own, part=part, base=base, name=name)
    return type(base)(pipeline, name=name)


def differences(original: Family, erased: Family, *, name: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """`duo.artefacts.differences`."""
    original, erased = _known(original), _known(erased)
    before, after = _networks(original), _networks(erased)
    if before.keys() != after.keys():
        other = sorted(before.keys() ^ after.keys())[0]
        raise UserError(f"{name}: only one of it and {original.name!r} has a {other}; {OF_ANOTHER}")
    changed: dict[str, int] = {}
    rounded = 0
    for part, network in before.items():
        found = [_change(old, new) for old, new in _tensors(network, after[part], part, name=name, model=original.name)]
        changed[part], rounded = found.count("changed"), rounded + found.count("rounded")
    told = []
    if not any(changed.values()):
        told.append(
            f"{name} differs from {original.name!r} by rounding alone: it erases nothing"
            if rounded
            else f"{name} changes nothing: all its weights are those of {original.name!r}"
        )
    if changed.get("vae"):
        told.append(f"{name} has another VAE than {original.name!r}: images differ by that too")
    told += _settings(original, erased, name=name)
    return changed, tuple(told)


def _known(model: Family) -> DiffusersFamily:
    if not isinstance(model, DiffusersFamily):
        raise UserError(
            f"model {model.name!r} is of a family that is not duo's own; merge the erasure into a model of it"
        )
    return model


# --- LoRA -----------------------------------------------------------------------------------------


def _fuse(pipeline: Any, path: Path, *, base: DiffusersFamily, name: str) -> None:
    """Put a LoRA into the weights of the networks that it names, by diffusers' own loader."""
    tensors, _ = read_tensors(path, todo="download it again")
    _check_finite(tensors, name)
    expected = _lora_layers(pipeline, tensors, base=base, name=name)
    with _one_line(name, base), quiet(), _silent():
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        for part, layers in expected.items():
            modules = getattr(pipeline, part).named_modules()
            loaded = {layer for layer, module in modules if isinstance(module, BaseTunerLayer)}
            if lost := sorted(layers - loaded):
                raise UserError(
                    f"{name}: diffusers does not load its LoRA of {part}.{lost[0]}; merge it and give a model"
                )
        pipeline.fuse_lora(components=list(expected))
        pipeline.unload_lora_weights()
    for part in expected:
        _check_finite(getattr(pipeline, part).state_dict(), f"{name} on {base.name!r}", part=part)


def _lora_layers(
    pipeline: Any, tensors: Mapping[str, Tensor], *, base: DiffusersFamily, name: str
) -> dict[str, set[str]]:
    """The layers of each network that a LoRA is of, each with both its halves, which fit the layer."""
    settings = {"unet_config": pipeline.unet.config} if base.component == "unet" else {}
    with _one_line(name, base), _silent():
        found = type(pipeline).lora_state_dict(dict(tensors), **settings)
    converted: Mapping[str, Tensor] = found[0] if isinstance(found, tuple) else found
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in converted.items():
        part, _, rest = key.partition(".")
        if part not in type(pipeline)._lora_loadable_modules or getattr(pipeline, part, None) is None:
            raise UserError(f"{name} holds {key}, and model {base.name!r} takes no LoRA of such a name; {OF_ANOTHER}")
        parts.setdefault(part, {})[rest] = tensor
    layers: dict[str, set[str]] = {}
    for part, own in parts.items():
        network = getattr(pipeline, part)
        with _one_line(name, base):
            named = _peft_names(network, own)
        layers[part] = _checked_layers(named, network, part=part, base=base, name=name)
    if not layers:
        raise UserError(f"{name} holds no LoRA that diffusers reads for model {base.name!r}; {OF_ANOTHER}")
    return layers


def _peft_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's LoRA as peft names it, `layer.lora_A.weight`, from any of diffusers' names."""
    if not isinstance(network, PreTrainedModel):
        first = next(iter(tensors))
        return dict(tensors) if ".lora_A." in first or ".lora_B." in first else convert_unet_state_dict_to_peft(tensors)
    named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(tensors)))
    return {_clip_name(network, key): tensor for key, tensor in named.items()}


def _checked_layers(
    tensors: Mapping[str, Tensor], network: nn.Module, *, part: str, base: DiffusersFamily, name: str
) -> set[str]:
    modules = dict(network.named_modules())
    layers = set()
    for key in tensors:
        layer, _, half = key.partition(".lora_")
        if half not in ("A.weight", "B.weight", "B.bias"):
            raise UserError(f"{name} holds {part}.{key}, which is no part of a LoRA; merge it and give a model")
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None:
            raise UserError(f"{name} holds {part}.{key}, and model {base.name!r} has no such layer; {OF_ANOTHER}")
        down, up = (tensors.get(f"{layer}.lora_{one}.weight") for one in "AB")
        if down is None or up is None:
            raise UserError(f"{name} holds {part}.{key} without its other half; download it again")
        fits = down.dim() >= 2 <= up.dim() and (up.shape[0], down.shape[1]) == tuple(weight.shape[:2])
        fits = fits and up.shape[1] == down.shape[0]
        if not fits:
            raise UserError(
                f"{name}: the LoRA of {part}.{layer} is {tuple(up.shape)} by {tuple(down.shape)}, and the layer of "
                f"model {base.name!r} is {tuple(weight.shape)}; {OF_ANOTHER}"
            )
        layers.add(layer)
    return layers


# --- weights --------------------------------------------------------------------------------------


def _routed(
    pipeline: Any, tensors: Mapping[str, Tensor], kind: str, *, base: DiffusersFamily, name: str
) -> dict[str, dict[str, Tensor]]:
    """A file's tensors for each of the pipeline's networks, under the networks' own names."""
    _check_finite(tensors, name)
    networks = {part: one for part, one in pipeline.components.items() if isinstance(one, nn.Module) and part != "vae"}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, rest = base.component if kind == "denoiser" else "", key
        first, _, after = key.partition(".")
        if key.startswith(AUTHORS_PREFIX):
            part, rest = base.component, key.removeprefix(AUTHORS_PREFIX)
        elif first in networks:
            part, rest = first, after
        elif first in ("unet", "transformer") or first.startswith("text_encoder"):
            raise UserError(f"{name} holds {key}, and model {base.name!r} has no {first}; {OF_ANOTHER}")
        parts.setdefault(part, {})[rest] = tensor
    if "" in parts:
        shapes = {key: tuple(tensor.shape) for key, tensor in parts[""].items()}
        parts[_encoder_of(pipeline, shapes, name=name)] = parts.pop("")
    own = parts.get(base.component, {})
    if any(key.startswith(AUTHORS) for key in own):
        parts[base.component] = _renamed(base.denoiser, own, base=base, name=name)
    return parts


def _take_over(
    network: nn.Module, tensors: Mapping[str, Tensor], *, part: str, base: DiffusersFamily, name: str
) -> None:
    """Copy weights into a network, all of whose names and shapes are checked first."""
    own = network.state_dict()
    named = {_clip_name(network, key): (key, tensor) for key, tensor in tensors.items()}
    used = {to: pair for to, pair in named.items() if not _unused(to, own)}
    for to, (key, tensor) in used.items():
        if to not in own:
            raise UserError(
                f"{name} holds {key}, and the {part} of model {base.name!r} has no such weight; {OF_ANOTHER}"
            )
        if tensor.shape != own[to].shape:
            raise UserError(
                f"{name}: {key} is {tuple(tensor.shape)}, and in the {part} of model {base.name!r} it is "
                f"{tuple(own[to].shape)}; {OF_ANOTHER}"
            )
    with torch.no_grad():
        for to, (_, tensor) in used.items():
            own[to].copy_(tensor)  # a state dict shares its tensors with the network


def _renamed(
    denoiser: nn.Module, tensors: Mapping[str, Tensor], *, base: DiffusersFamily, name: str
) -> dict[str, Tensor]:
    """A whole denoiser under diffusers' names, from those of its authors' code."""
    network: Any = denoiser
    partly = (
        f"{name} is in the layout of its authors' code and holds a part of the denoiser of model {base.name!r}, or "
        "that of another; give all of it, or save it under diffusers' names"
    )
    with tempfile.TemporaryDirectory() as folder, quiet(), _silent():
        network.save_config(folder)
        given = {f"{AUTHORS_PREFIX}{key}": tensor for key, tensor in tensors.items()}
        try:
            whole = type(network).from_single_file(given, config=folder, dtype=network.dtype)
        except FAILURES as error:
            raise UserError(f"{partly} ({type(error).__name__}: {first_line(error)})") from error
    found: dict[str, Tensor] = whole.state_dict()
    # The converter skips names that it does not know; some layers are stacked, so that only values can be counted.
    if any(tensor.is_meta for tensor in found.values()) or _values(found) != _values(tensors):
        raise UserError(partly)
    return found


def _network(old: Any, folder: Path, *, base: DiffusersFamily, name: str) -> nn.Module:
    """The network of a folder of `save_pretrained`, of the class that it takes the place of, with its own settings."""
    with _one_line(name, base), quiet(), _silent():
        given: dict[str, Any] = {"dtype": old.dtype, "use_safetensors": True}
        new, info = type(old).from_pretrained(str(folder), output_loading_info=True, **given)
    own = new.state_dict()
    lost = sorted(info["missing_keys"]) + [key for key, tensor in own.items() if tensor.is_meta]
    more = [key for key in info["unexpected_keys"] if not _unused(_clip_name(new, key), own)]
    if lost or more:
        told = f"lacks {lost[0]}" if lost else f"holds {sorted(more)[0]}, which a {type(old).__name__} has not"
        raise UserError(f"{name} {told}; download it again")
    _check_finite(own, name)
    for key, tensor in own.items():
        _check_same(old.state_dict().get(key), tensor, key, name=name, model=base.name)
    new.to(base.device)
    return new


def _encoder_of(pipeline: Any, shapes: Mapping[str, tuple[int, ...]], *, name: str) -> str:
    """Which of the pipeline's text encoders weights of these names and shapes are of."""
    near: dict[str, str | None] = {}
    for part, encoder in pipeline.components.items():
        if not isinstance(encoder, PreTrainedModel):
            continue
        own = encoder.state_dict()
        named = {_clip_name(encoder, key): (key, shape) for key, shape in shapes.items()}
        used = {to: pair for to, pair in named.items() if not _unused(to, own)}
        wrong = next((k for to, (k, shape) in used.items() if to not in own or tuple(own[to].shape) != shape), None)
        near[part] = wrong if used else next(iter(shapes))
    fitting = [part for part, wrong in near.items() if wrong is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(f"{name} fits each of {', '.join(fitting)}; put `{fitting[0]}.` before its names, or another's")
    told = "; ".join(f"not of {part}: {key}" for part, key in near.items())
    raise UserError(f"{name} holds weights of no text encoder of the original ({told}); {OF_ANOTHER}")


def _clip_name(encoder: nn.Module, key: str) -> str:
    """A weight's name in `encoder`: CLIP text models have `text_model.` before their names in some releases only."""
    if not isinstance(encoder, PreTrainedModel):
        return key
    bare = key.removeprefix("text_model.")
    outer = bare.startswith((*UNUSED, "shared.", "encoder.block.", "encoder.final_layer_norm", "encoder.embed_tokens"))
    return bare if outer or not hasattr(encoder, "text_model") else f"text_model.{bare}"


def _unused(key: str, own: Mapping[str, Tensor]) -> bool:
    """Whether an encoder whose state is `own` may leave a weight out."""
    return key not in own and (key.startswith(UNUSED) or key.endswith(".position_ids"))


def _shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all weights of a network's folder."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob(f"*{WEIGHTS}")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); download it again") from error
    return found


# --- checks ---------------------------------------------------------------------------------------


def _check_finite(tensors: Mapping[str, Tensor], name: str, *, part: str = "") -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            told = f"{part}.{key}" if part else key
            raise UserError(f"{name}: {told} holds NaN or infinity; it is damaged, or too large for its dtype")


def _check_same(old: Tensor | None, new: Tensor, key: str, *, name: str, model: str) -> None:
    """Raise `UserError` where a weight of the erased model has not the shape that the original's has."""
    if old is None or old.shape != new.shape:
        told = "none" if old is None else str(tuple(old.shape))
        raise UserError(f"{name}: {key} is {tuple(new.shape)}, and that of model {model!r} is {told}; {OF_ANOTHER}")


def _networks(model: DiffusersFamily) -> dict[str, nn.Module]:
    parts = {part: one for part, one in model._parts.items() if isinstance(one, nn.Module)}
    return {model.component: model.denoiser, **parts}


def _tensors(
    before: nn.Module, after: nn.Module, part: str, *, name: str, model: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights of two networks side by side."""
    old, new = before.state_dict(), after.state_dict()
    for key, tensor in new.items():
        _check_same(old.get(key), tensor, f"{part}.{key}", name=name, model=model)
        yield old[key], tensor.to(old[key].device)
    if lost := sorted(old.keys() - new.keys()):
        raise UserError(f"{name}: its {part} has no {lost[0]}, and that of model {model!r} has; {OF_ANOTHER}")


def _change(old: Tensor, new: Tensor) -> str:
    """ "same", "rounded" where a half precision that it was released in is all that differs, or "changed"."""
    if torch.equal(old, new):
        return "same"
    if any(torch.equal(old.to(half).to(new.dtype), new) for half in HALVES):
        return "rounded"
    return "changed"


def _settings(original: DiffusersFamily, erased: DiffusersFamily, *, name: str) -> list[str]:
    """What differs besides weights, such as a folder of a later release has it."""
    told = []
    old, new = original._scheduler, erased._scheduler
    if type(old) is not type(new):
        told.append(f"it samples with {type(new).__name__}, the original with {type(old).__name__}")
    else:
        fields = sorted(key for key in {*old.config, *new.config} if not key.startswith("_"))
        other = next((key for key in fields if _json(old.config.get(key)) != _json(new.config.get(key))), None)
        if other is not None:
            told.append(f"its scheduler has {other} = {new.config.get(other)}, the original's {old.config.get(other)}")
    for part, mine in original._parts.items():
        vocabulary = getattr(mine, "get_vocab", None)
        if vocabulary is not None and vocabulary() != erased._parts[part].get_vocab():
            told.append(f"its {part} has another vocabulary than the original's")
    return [f"{name}: {one}: images differ by that too" for one in told]


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _values(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@contextmanager
def _one_line(name: str, base: Family) -> Iterator[None]:
    """Turn what diffusers, transformers and peft raise for files that they cannot read into a `UserError`."""
    try:
        with no_pickles():
            yield
    except FAILURES as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name} cannot be loaded for model {base.name!r} ({told}); {OF_ANOTHER}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings of diffusers' loaders: what they warn of is refused here."""
    was = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(was)
