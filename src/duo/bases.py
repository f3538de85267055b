"""Which base model an erasure is of: digests of a few of its weights, for a name or a path may come to mean another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from duo.errors import UserError
from duo.plugins import Family

VALUES = 2**20  # of each layer that is hashed, from its beginning: milliseconds for any model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What modules' weights were before the first of the deltas that are attached now.
_untouched: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def base_digest(model: Family, layers: Sequence[str]) -> dict[str, Any]:
    """The digests of the first, the middle and the last of `layers`: `{"layers": […], "float32": sha256, …}`.

    There is one for each dtype that their weights are in or can be rounded to, so that a model that was loaded in
    another precision is known again. The denoiser's config has no part in it: it gains fields as diffusers grows.
    """
    names = sorted(layers)
    chosen = sorted({names[0], names[len(names) // 2], names[-1]})
    weights = [_weight(model.denoiser.get_submodule(name)) for name in chosen]
    digests: dict[str, Any] = {"layers": chosen}
    for name, dtype in DTYPES.items():
        if all(weight.dtype in (torch.float32, dtype) for weight in weights):
            digests[name] = _digest(weights, dtype)
    return digests


def check_base(record: Mapping[str, Any], model: Family) -> None:
    """Raise `UserError` where a delta's `record` has digests of another base than `model`, or a part of it has.

    A base is the same where a digest of any one dtype is: files of the variant fp16 hold the rounded weights. Old
    records without digests pass, and so do weights in a half precision that the digests do not know.
    """
    for part in record.get("composed", ()):
        check_base(part, model)
    base = record.get("base")
    if base is None:
        return
    own = base_digest(model, base["layers"])
    compared = [name for name in DTYPES if name in base and name in own]
    if compared and all(base[name] != own[name] for name in compared):
        raise UserError(
            f"the delta was made for {record.get('model', 'another model')!r} with other weights than model "
            f"{model.name!r} has at layer {base['layers'][0]} and others; give the base that it was made for, "
            "unchanged (several erasures are composed before they are merged), or erase again"
        )


@contextmanager
def remembered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the weights that `modules` have now are the base's, whatever delta is attached to them."""
    new = [module for module in modules if module not in _untouched]
    _untouched.update({module: module.get_parameter("weight").data for module in new})
    try:
        yield
    finally:
        for module in new:
            del _untouched[module]


def _weight(module: nn.Module) -> Tensor:
    weight = _untouched.get(module, module.get_parameter("weight"))
    return weight.detach().flatten()[:VALUES].cpu()


def _digest(weights: Sequence[Tensor], dtype: torch.dtype) -> str:
    found = hashlib.sha256()
    for weight in weights:
        found.update(weight.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
