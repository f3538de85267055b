"""`Delta`: what an erasure changed in a denoiser. Saved as one safetensors file that diffusers loads as a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.plugins import Family

SCHEMA = 1
KINDS = ("lora",)
DENOISER = "unet."  # diffusers' name of the denoiser in a LoRA file


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A change of the denoiser's weights and how it came about.

    Kind "lora": `tensors` has, for each changed module `m`, `m.lora_A.weight` (rank, in, …) and `m.lora_B.weight`
    (out, rank, …), names relative to the denoiser. Their product is the change itself: a scale alpha/rank is already in
    B, so no reader needs alpha. `record` says which model, method, configuration and LoRA made it; JSON values only.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; `pipeline.load_lora_weights` of diffusers reads it too."""
        tensors = {f"{DENOISER}{name}": tensor for name, tensor in self.tensors.items()}
        write_tensors(path, tensors, {"schema": SCHEMA, "kind": self.kind, **self.record})

    @classmethod
    def load(cls, path: Path) -> Delta:
        """Read a file of `save`."""
        tensors, record = read_tensors(path)
        if record.get("schema") != SCHEMA or record.get("kind") not in KINDS:
            raise UserError(f"{path} is not a delta that this version of duo wrote; run `duo erase` again")
        kind = str(record["kind"])
        rest = {key: value for key, value in record.items() if key not in ("schema", "kind")}
        return cls(kind=kind, tensors={k.removeprefix(DENOISER): v for k, v in tensors.items()}, record=rest)

    @contextmanager
    def attached(self, model: Family, weight: float = 1.0) -> Iterator[None]:
        """Within the context the model is the erased one; after it the weights are the very tensors from before.

        The changed weights are swapped in, with no adapter modules: sampling runs at the speed of the plain model and
        gives the same images as `merge`. Contexts may be nested, the last one entered being left first.
        """
        modules = self._modules(model)
        originals = {name: module.weight.data for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.weight.data = self._changed(name, originals[name], weight)
            yield
        finally:
            for name, module in modules.items():
                module.weight.data = originals[name]

    def merge(self, model: Family) -> None:
        """Bake the change into the model's own weights; summed in float32."""
        for name, module in self._modules(model).items():
            module.weight.data = self._changed(name, module.weight.data, 1.0)

    def _modules(self, model: Family) -> dict[str, Any]:
        """The changed modules by name, checked against the tensors' shapes."""
        names = sorted({name.rsplit(".lora_", 1)[0] for name in self.tensors})
        known: dict[str, nn.Module] = dict(model.denoiser.named_modules())
        for name in names:
            weight = getattr(known.get(name), "weight", None)
            if weight is None or weight.shape[:2] != self._shape(name):
                base = self.record.get("model", "another model")
                raise UserError(
                    f"the delta was made for {base!r} and does not fit model {model.name!r} at layer {name}"
                )
        return {name: known[name] for name in names}

    def _shape(self, name: str) -> tuple[int, int]:
        return self.tensors[f"{name}.lora_B.weight"].shape[0], self.tensors[f"{name}.lora_A.weight"].shape[1]

    def _changed(self, name: str, weight: Tensor, scale: float) -> Tensor:
        """W + scale·B·A. A convolution's A holds its kernel and its B is 1×1, so flattened they multiply alike."""
        down, up = (self.tensors[f"{name}.lora_{part}.weight"].to(weight.device, torch.float32) for part in "AB")
        change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        return (weight.float() + scale * change).to(weight.dtype)
