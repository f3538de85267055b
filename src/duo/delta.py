"""`Delta`: what an erasure changed in a denoiser. Saved as one safetensors file that diffusers loads as a LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duo.bases import check_base, remembered
from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.plugins import Family

SCHEMA = 1
KINDS = ("lora",)
COMPONENTS = ("unet", "transformer")  # what a denoiser is called in diffusers' pipelines and in LoRA files


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A change of the denoiser's weights and how it came about.

    Kind "lora": `tensors` has, for each changed module `m`, `m.lora_A.weight` (rank, in, …) and `m.lora_B.weight`
    (out, rank, …), names relative to the denoiser. Their product is the change itself: a scale alpha/rank is already in
    B, so no reader needs alpha. `record` says which model, method, configuration and LoRA made it; JSON values only.
    `component` is the family's (`duo.plugins.Family`), by which diffusers knows what the file is for.
    """

    kind: str
    component: str
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; `pipeline.load_lora_weights` of diffusers reads it too."""
        tensors = {f"{self.component}.{name}": tensor for name, tensor in self.tensors.items()}
        write_tensors(path, tensors, {"schema": SCHEMA, "kind": self.kind, **self.record})

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Read a file of `save`; a `UserError` where it is none, or holds what is no change of weights."""
        tensors, record = read_tensors(path, todo="give a file that `duo erase` wrote")
        components = {name.partition(".")[0] for name in tensors}
        known = record.get("schema") == SCHEMA and record.get("kind") in KINDS
        if not known or len(components) != 1 or not components <= {*COMPONENTS}:
            raise UserError(f"{path} is not a delta that this version of duo wrote; give one, or the folder of a run")
        (component,), kind = components, str(record["kind"])
        rest = {key: value for key, value in record.items() if key not in ("schema", "kind")}
        named = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
        _check_tensors(path, kind, named)
        return cls(kind=kind, component=component, tensors=named, record=rest)

    def layers(self) -> list[str]:
        """The names of the changed modules, in order."""
        return sorted({name.rsplit(".lora_", 1)[0] for name in self.tensors})

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A layer's A (rank, in, …) and B (out, rank, …)."""
        down, up = (self.tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        return down, up

    @contextmanager
    def attached(self, model: Family, weight: float = 1.0) -> Iterator[None]:
        """Within the context the model is the erased one; after it the weights are the very tensors from before.

        The changed weights are swapped in, with no adapter modules: sampling runs at the speed of the plain model and
        gives the same images as `merge`. Contexts may be nested, the last one entered being left first. Raises
        `UserError` where the delta does not fit the model, or was made for a base with other weights.
        """
        modules = self._modules(model)
        originals = {name: module.weight.data for name, module in modules.items()}
        with remembered(modules.values()):
            try:
                for name, module in modules.items():
                    module.weight.data = self._changed(name, originals[name], weight)
                yield
            finally:
                for name, module in modules.items():
                    module.weight.data = originals[name]

    def merge(self, model: Family) -> None:
        """Bake the change into the model's own weights; summed in float32. Refuses what `attached` does."""
        for name, module in self._modules(model).items():
            module.weight.data = self._changed(name, module.weight.data, 1.0)

    def _modules(self, model: Family) -> dict[str, Any]:
        """The changed modules by name, checked against the tensors' shapes and the base that they were made for."""
        names = self.layers()
        known: dict[str, nn.Module] = dict(model.denoiser.named_modules())
        for name in names:
            weight = getattr(known.get(name), "weight", None)
            if weight is None or weight.shape[:2] != self._shape(name):
                base = self.record.get("model", "another model")
                raise UserError(
                    f"the delta was made for {base!r} and does not fit model {model.name!r} at layer {name}"
                )
        check_base(self.record, model)
        return {name: known[name] for name in names}

    def _shape(self, name: str) -> tuple[int, int]:
        down, up = self.factors(name)
        return up.shape[0], down.shape[1]

    def _changed(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """W + scale·B·A. A convolution's A holds its kernel and its B is 1×1, so flattened they multiply alike."""
        down, up = (factor.to(weight.device, torch.float32) for factor in self.factors(name))
        change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        return (weight.float() + scale * change).to(weight.dtype)


def compose(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """Several erasures of one model as one: W + Σ wᵢ·Bᵢ·Aᵢ, by putting the ranks side by side; nothing is approximated.

    `weights` are 1 each where None. The erasures were trained apart, so how each of them fares beside the others has to
    be measured. Raises `UserError` where they are of different models, kinds or shapes, a weight is no use, or the sum
    overflows.
    """
    weights = [1.0] * len(deltas) if weights is None else list(weights)
    if not deltas or len(weights) != len(deltas):
        raise UserError(f"{len(deltas)} erasures but {len(weights)} weights; give one weight for each")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"an erasure has the weight {weight:g}, expected above 0; below it the concept comes back")
    first = deltas[0]
    alike: dict[str, list[Any]] = {
        "models": [delta.record.get("model") for delta in deltas],
        "kinds": [delta.kind for delta in deltas],
        "components": [delta.component for delta in deltas],
    }
    for what, found in alike.items():
        one, *others = dict.fromkeys(found)
        if others:
            raise UserError(f"the erasures are of different {what}, {one!r} and {others[0]!r}, and cannot be composed")
    tensors: dict[str, Tensor] = {}
    for layer in sorted({layer for delta in deltas for layer in delta.layers()}):
        parts = [(*one.factors(layer), w) for one, w in zip(deltas, weights, strict=True) if layer in one.layers()]
        downs, ups = [down.float() for down, _, _ in parts], [up.float() * weight for _, up, weight in parts]
        if len({(down.shape[1:], up.shape[0]) for down, up in zip(downs, ups, strict=True)}) > 1:
            raise UserError(f"the erasures have different shapes at layer {layer}, and cannot be composed")
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = torch.cat(downs), torch.cat(ups, dim=1)
    wrong = not_finite(tensors)
    if wrong is not None:
        raise UserError(f"at these weights the erasures come to {wrong} that is not finite; give smaller weights")
    made = [{"weight": weight, **one.record} for one, weight in zip(deltas, weights, strict=True)]
    record = {**({"model": first.record["model"]} if "model" in first.record else {}), "composed": made}
    return Delta(kind=first.kind, component=first.component, tensors=tensors, record=record)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _check_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where half of a low-rank product is missing or does not fit the other, or one is not finite."""
    for name in tensors:
        module, low_rank, _ = name.partition(".lora_")
        down, up = (f"{module}.lora_{part}.weight" for part in "AB")
        if not low_rank and kind != "lora":
            continue
        missing = next((half for half in (down, up) if half not in tensors), None)
        if missing is not None:
            raise UserError(f"{path} holds {name} but no {missing}; restore it, or run `duo erase` again")
        if tensors[down].dim() < 2 or tensors[up].shape[1:2] != tensors[down].shape[:1]:
            raise UserError(f"{path}: {down} and {up} are of different ranks; restore it, or run `duo erase` again")
    wrong = not_finite(tensors)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} holds NaN or infinity, which would ruin the model; run `duo erase` again")
