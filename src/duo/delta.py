"""`Delta`: what an erasure changed in a denoiser, as one safetensors file.

Three kinds. "lora" and "weights" add to the denoiser's own weights, as low-rank products and as whole differences;
"gated" are adapters that each prompt switches on by itself (`duo.gating`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duo import gating
from duo.bases import check_base, remembered
from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.plugins import Family, Run
from duo.rundir import check_schema

SCHEMA = 1
KINDS = ("lora", "weights", "gated")
COMPONENTS = ("unet", "transformer")  # what a denoiser is called in diffusers' pipelines and in LoRA files
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIFFERENCE = ".diff"  # ends the names of kind "weights": nobody shall take a difference for the weight itself
NAMES = {  # what tensors of each kind may be called; the halves of a low-rank product are looked for by themselves
    "lora": r".+",
    "weights": rf".+{re.escape(DIFFERENCE)}",
    "gated": r"[0-9]{1,6}\.(gate\.embeds|.+\.lora_[AB]\.weight)",
}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A change of the denoiser's weights and how it came about. `tensors` are named relative to the denoiser.

    Kind "lora": for each changed module `m`, `m.lora_A.weight` (rank, in, …) and `m.lora_B.weight` (out, rank, …).
    Their product is the change itself: a scale alpha/rank is already in B, so no reader needs alpha.

    Kind "weights": for each changed parameter `p`, `p.diff`, the new value less the old one.

    Kind "gated": adapters number i = 0, 1, … of rank 1 or more, `i.m.lora_A.weight` and `i.m.lora_B.weight` as above,
    and what the gate of each compares prompts with, as `duo.gating` has it.

    `record` says which model, method and configuration made it; JSON values only. `component` is the family's
    (`duo.plugins.Family`), by which diffusers knows what the file is for.
    """

    kind: str
    component: str
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; of kind "lora" `pipeline.load_lora_weights` of diffusers reads it too."""
        tensors = {f"{self.component}.{name}": tensor for name, tensor in self.tensors.items()}
        write_tensors(path, tensors, {"schema": SCHEMA, "kind": self.kind, **self.record})

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Read a file of `save`; a `UserError` where it is none, or holds what is no change of weights."""
        tensors, record = read_tensors(path, todo="give a file that `duo erase` wrote")
        components = {name.partition(".")[0] for name in tensors}
        if "kind" in record:
            check_schema(path, record, SCHEMA, otherwise="")
        known = record.get("schema") == SCHEMA and record.get("kind") in KINDS
        if not known or len(components) != 1 or not components <= {*COMPONENTS}:
            raise UserError(f"{path} is not a delta that this version of duo wrote; give one, or the folder of a run")
        (component,), kind = components, str(record["kind"])
        rest = {key: value for key, value in record.items() if key not in ("schema", "kind")}
        named = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
        _check_tensors(path, kind, named)
        if kind == "gated":
            _check_gates(path, named, rest)
        return cls(kind=kind, component=component, tensors=named, record=rest)

    def layers(self) -> list[str]:
        """The names of the changed modules, in order."""
        if self.kind == "weights":
            return sorted({name.removesuffix(DIFFERENCE).rpartition(".")[0] for name in self.tensors})
        layers = {name.rsplit(".lora_", 1)[0] for name in self.tensors if ".lora_" in name}
        return sorted({name.partition(".")[2] for name in layers} if self.kind == "gated" else layers)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Of kind "lora": a layer's A (rank, in, …) and B (out, rank, …)."""
        down, up = (self.tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        return down, up

    @contextmanager
    def attached(self, model: Family, weight: float = 1.0) -> Iterator[Callable[[], AbstractContextManager[Family]]]:
        """Within the context the model is the erased one; after it the weights are the very tensors from before.

        Changed weights are swapped in, with no adapter modules: sampling runs at the speed of the plain model and gives
        the same images as `merge`. A "gated" delta has to stay beside the weights, and costs a little. Contexts may be
        nested, the last one entered being left first. Raises `UserError` where the delta does not fit the model, or was
        made for a base with other weights.

        What it yields makes a context within which the model is for a while the one from before. A backward pass must
        not begin on one side of that and end on the other.
        """
        if self.kind == "gated":
            self._check(model)
            with gating.attached(self.tensors, self.record, model, weight) as shut:
                yield shut
            return
        modules = self._check(model)
        parameters = self._parameters(modules)
        originals = {name: parameter.data for name, parameter in parameters.items()}

        def put(values: Mapping[str, Tensor]) -> None:
            for name, parameter in parameters.items():
                parameter.data = values[name]

        @contextmanager
        def detached() -> Iterator[Family]:
            changed = {name: parameter.data for name, parameter in parameters.items()}
            put(originals)
            try:
                yield model
            finally:
                put(changed)

        with remembered(modules.values()):
            try:
                for name, parameter in parameters.items():
                    parameter.data = self._changed(name, originals[name], weight)
                yield detached
            finally:
                put(originals)

    def merge(self, model: Family) -> None:
        """Bake the change into the model's own weights; summed in float32. Refuses what `attached` does."""
        self.refuse_gate("merged into weights")
        for name, parameter in self._parameters(self._check(model)).items():
            parameter.data = self._changed(name, parameter.data, 1.0)

    def refuse_gate(self, wanted: str) -> None:
        """Raise `UserError` where the delta is gated by prompts, and so cannot be what is `wanted`."""
        if self.kind == "gated":
            method = self.record.get("method", "this method")
            raise UserError(
                f"an erasure by {method} acts by how near a prompt is to the concept, so it cannot be {wanted}; "
                "attach it (`Delta.attached`), or erase with a method that changes weights"
            )

    def _check(self, model: Family) -> dict[str, nn.Module]:
        """The changed modules by name, checked against the tensors' shapes and the base that they were made for."""
        known: dict[str, nn.Module] = dict(model.denoiser.named_modules())
        for name in self.layers():
            if not self._fits(name, known.get(name)):
                base = self.record.get("model", "another model")
                raise UserError(
                    f"the delta was made for {base!r} and does not fit model {model.name!r} at layer {name}"
                )
        check_base(self.record, model)
        return {name: known[name] for name in self.layers()}

    def _fits(self, layer: str, module: nn.Module | None) -> bool:
        own = {} if module is None else {part: one.shape for part, one in module.named_parameters(recurse=False)}
        if self.kind == "weights":
            changed = {name.removesuffix(DIFFERENCE).rpartition("."): one.shape for name, one in self.tensors.items()}
            return {part: shape for (of, _, part), shape in changed.items() if of == layer}.items() <= own.items()
        for name in self._named_a(layer):
            down, up = self.tensors[name], self.tensors[name.replace(".lora_A.", ".lora_B.")]
            if "weight" not in own or own["weight"][:2] != (up.shape[0], down.shape[1]):
                return False
        return True

    def _named_a(self, layer: str) -> list[str]:
        """The names of a layer's A: one, or of kind "gated" one for each adapter that is on it."""
        if self.kind == "lora":
            return [f"{layer}.lora_A.weight"]
        return [name for name in self.tensors if name.partition(".")[2] == f"{layer}.lora_A.weight"]

    def _parameters(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        """The changed parameters of the changed modules, by name."""
        names = (
            [name.removesuffix(DIFFERENCE) for name in sorted(self.tensors)]
            if self.kind == "weights"
            else [f"{layer}.weight" for layer in modules]
        )
        return {name: getattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in names}

    def _changed(self, name: str, value: Tensor, scale: float) -> Tensor:
        """W + scale·B·A, or W + scale·difference, in the dtype of W."""
        if self.kind == "weights":
            change = self.tensors[f"{name}{DIFFERENCE}"].to(value.device, torch.float32)
        else:  # a convolution's A holds its kernel and its B is 1×1, so flattened they multiply alike
            down, up = (one.to(value.device, torch.float32) for one in self.factors(name.removesuffix(".weight")))
            change = (up.flatten(1) @ down.flatten(1)).view(value.shape)
        return (value.float() + scale * change).to(value.dtype)


def made_by(method: str, settings: Any, *, model: Family, run: Run) -> dict[str, Any]:
    """What every delta's record says: the model, the method, its configuration (a dataclass) and the seed."""
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {"model": model.name, "method": method, "config": config, "seed": run.seed}


def compose(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """Several erasures of one model as one: the sum of their changes times `weights` (1 each where None), exactly.

    Low-rank ones are put side by side, differences are added, and gated ones keep a gate each. The erasures were
    trained apart, so how each of them fares beside the others has to be measured. Raises `UserError` where they are of
    different models, kinds or shapes, a weight is no use, or the sum overflows.
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
    made = [{"weight": weight, **one.record} for one, weight in zip(deltas, weights, strict=True)]
    record = {**({"model": first.record["model"]} if "model" in first.record else {}), "composed": made}
    joined: dict[str, Callable[[Sequence[Delta], Sequence[float]], dict[str, Tensor]]] = {
        "lora": _side_by_side,
        "weights": _added,
        "gated": _numbered,
    }
    if first.kind == "gated":
        record |= gating.joined_record([delta.record for delta in deltas])
    tensors = joined[first.kind](deltas, weights)
    wrong = not_finite(tensors)
    if wrong is not None:
        raise UserError(f"at these weights the erasures come to {wrong} that is not finite; give smaller weights")
    return Delta(kind=first.kind, component=first.component, tensors=tensors, record=record)


def _side_by_side(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, Tensor]:
    """W + Σ wᵢ·Bᵢ·Aᵢ by putting the ranks side by side."""
    tensors: dict[str, Tensor] = {}
    for layer in sorted({layer for delta in deltas for layer in delta.layers()}):
        parts = [(*one.factors(layer), w) for one, w in zip(deltas, weights, strict=True) if layer in one.layers()]
        downs, ups = [down.float() for down, _, _ in parts], [up.float() * weight for _, up, weight in parts]
        if len({(down.shape[1:], up.shape[0]) for down, up in zip(downs, ups, strict=True)}) > 1:
            raise UserError(f"the erasures have different shapes at layer {layer}, and cannot be composed")
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = torch.cat(downs), torch.cat(ups, dim=1)
    return tensors


def _added(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, Tensor]:
    """W + Σ wᵢ·Dᵢ."""
    tensors: dict[str, Tensor] = {}
    for delta, weight in zip(deltas, weights, strict=True):
        for name, tensor in delta.tensors.items():
            if name in tensors and tensors[name].shape != tensor.shape:
                raise UserError(f"the erasures have different shapes at {name}, and cannot be composed")
            tensors[name] = tensors.get(name, torch.zeros_like(tensor, dtype=torch.float32)) + weight * tensor.float()
    return tensors


def _numbered(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, Tensor]:
    """The adapters of all, numbered anew; copies, as no file can hold one tensor under two names."""
    tensors: dict[str, Tensor] = {}
    first = 0
    for delta, weight in zip(deltas, weights, strict=True):
        count = gating.adapters(delta.tensors)
        for name, tensor in delta.tensors.items():
            number, _, rest = name.partition(".")
            tensors[f"{first + int(number)}.{rest}"] = tensor * weight if ".lora_B" in rest else tensor.clone()
        first += count
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _check_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where a name is none of its kind's, half of a low-rank product is missing or does not fit the
    other, or a tensor is not of numbers that are finite."""
    for name in tensors:
        if not re.fullmatch(NAMES[kind], name):
            raise UserError(f"{path} holds {name}, which is no name in a delta of kind {kind!r}; run `duo erase` again")
        if tensors[name].dtype not in DTYPES:
            told = str(tensors[name].dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name} as {told}, which no erasure is; run `duo erase` again")
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


def _check_gates(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Raise `UserError` where an adapter lacks its gate's embeddings or its words in the record."""
    count, gates = gating.adapters(tensors), record.get("gates")
    bare = next((i for i in range(count) if f"{i}.gate.embeds" not in tensors), None)
    if bare is not None:
        raise UserError(f"{path} holds adapter {bare} but no {bare}.gate.embeds; restore it, or run `duo erase` again")
    if not isinstance(gates, list) or len(gates) != count:
        told = len(gates) if isinstance(gates, list) else 0
        raise UserError(f"{path} has {count} adapters but {told} gates; restore it, or run `duo erase` again")
    for i, gate in enumerate(gates):
        if not (isinstance(gate, Mapping) and gate.get("token_ids")):
            raise UserError(f"{path}: gate {i} has no token_ids; restore it, or run `duo erase` again")
