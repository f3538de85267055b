"""An erasure as one LoRA file for other software: named as diffusers does, or as the trainers of kohya-ss do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from duo.checkpoint import write_tensors
from duo.delta import Delta
from duo.erasures import Composition
from duo.errors import UserError
from duo.models import denoiser_config, family_of
from duo.plugins import KohyaLayer
from duo.rundir import make_room

FORMATS = ("diffusers", "kohya")


def export(
    sources: Path | Sequence[Path], out: Path, *, to: str = "diffusers", weights: Sequence[float] | None = None
) -> Delta:
    """Write the erasure of a run or a delta file, or several of one model with `weights`, as the new file `out`.

    `to` "diffusers" is what `Delta.load` and `pipe.load_lora_weights` read; "kohya" is the key scheme of kohya-ss's
    trainers (`lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`), which most other software reads, and
    diffusers too. Returns the delta that was written.
    """
    if to not in FORMATS:
        raise UserError(f"format is {to!r}, expected {' or '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out} exists already; name a new file")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, by which other software knows the format")
    composed = Composition.read([sources] if isinstance(sources, Path) else sources, weights)
    composed.delta.refuse_gate("exported as a LoRA")
    if composed.delta.kind != "lora":
        method = composed.delta.record.get("method", "this method")
        raise UserError(f"an erasure by {method} changes whole weights and is no LoRA; write them by `duo merge`")
    make_room(out)
    if to == "diffusers":
        composed.delta.save(out)
    else:
        write_tensors(out, _kohya(composed), composed.delta.record)
    return composed.delta


def _kohya(composed: Composition) -> dict[str, Tensor]:
    """The tensors under kohya's names. Where its network stacks several layers into one, so are their LoRAs."""
    model, config = composed.model, composed.model_config
    delta, family = composed.delta, family_of(model, config=config)
    settings = denoiser_config(model, family.component, config=config)
    stacks: dict[str, list[tuple[KohyaLayer, Tensor, Tensor]]] = defaultdict(list)
    for layer in delta.layers():
        place: KohyaLayer | None = family.kohya(layer, settings)
        if place is None:
            raise UserError(
                f"kohya's key scheme is not defined for layer {layer} of {model!r} ({', '.join(family.pipelines)}); "
                "export with --format diffusers"
            )
        stacks[place.module].append((place, *delta.factors(layer)))
    rank = max(len(delta.factors(layer)[0]) for layer in delta.layers())
    tensors: dict[str, Tensor] = {}
    for module, parts in stacks.items():
        down, up = _stacked(parts, rank)
        tensors[f"lora_unet_{module}.lora_down.weight"] = down
        tensors[f"lora_unet_{module}.lora_up.weight"] = up
        # Readers multiply by alpha/rank, and the scale is in B already.
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def _stacked(parts: Sequence[tuple[KohyaLayer, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module from those of its layers: B in blocks, so that no layer has a part in another's change.

    Every layer gets the same `rank`, filled up with zeros, and one that was not changed gets zeros. So readers who want
    the layers one by one can cut them out again, and diffusers reads them rightly: where ranks differ from module to
    module it takes no notice of the alphas of a U-Net's attention.
    """
    first, down, up = parts[0]
    unit = up.shape[0] // first.widths[first.part]
    starts = [unit * sum(first.widths[:part]) for part in range(len(first.widths))]
    downs = down.new_zeros(len(first.widths) * rank, *down.shape[1:])
    ups = up.new_zeros(unit * sum(first.widths), len(downs), *up.shape[2:])
    for place, a, b in parts:
        column = place.part * rank
        downs[column : column + len(a)] = a
        ups[starts[place.part] : starts[place.part] + len(b), column : column + len(a)] = b
    return downs, ups
