"""Bake erasures into a model's full weights, so that they cannot be unloaded, and prove it by loading them again.

Merging is not irreversibility: who has the base model has the concept. It only means that the folder that is passed on
holds no adapter that one call removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open

from duo.concept import load_concept
from duo.delta import not_finite
from duo.erasures import Composition
from duo.errors import UserError
from duo.licence import Licence
from duo.models import load_family
from duo.plugins import Sampling
from duo.report import merged_card
from duo.rundir import make_room
from duo.stages.rescoring import Rescored, rescore

if TYPE_CHECKING:
    from PIL.Image import Image

    from duo.plugins import Family

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST_DIFFERENCE = 1  # of 255, in float32
ADAPTER_MARKS = ("lora_", "base_layer", "adapter")
PROMPTS = ("a photo of a house by the sea", "a portrait of a person")  # drawn where no run brings prompts


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What is known of a merged folder.

    `difference` is the largest of a colour value, of 255, between the erased model's images in float32 and the merged
    one's. `rescored` has a row for each run whose rates the merged weights need not share, because of a lower precision
    or of the other erasures; `unscored` are the runs of which nothing can be said, for they were not attacked.
    """

    difference: int
    rescored: tuple[Rescored, ...] = ()
    unscored: tuple[Path, ...] = ()


def merge(
    sources: Path | Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "fp32",
    device: torch.device | str = "cpu",
) -> Merged:
    """Write the erased model of a run or a delta file, or of several with `weights`, to the new diffusers folder `out`.

    The folder appears only once it is verified: loaded again, it holds no adapter weights, only finite ones and,
    in float32, draws what the model with the delta attached draws. In "fp16" or "bf16" images differ, and so may
    rates: those of the first attack row of each run are measured again, as they are where several erasures are merged.

    Whatever `dtype` is, weights are read and summed in float32 and rounded once, at the end: a change that is small
    beside its weight would be lost to a sum of halves. So one model in float32 has to fit in memory, and for fp16 and
    bf16 it lies on the disk for a while.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected {', '.join(DTYPES)}")
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    composed = Composition.read([sources] if isinstance(sources, Path) else sources, weights)
    composed.delta.refuse_gate("merged into weights")
    make_room(out)
    model = load_family(composed.model, device=device, config=composed.model_config)
    with composed.delta.attached(model):
        wanted = _draw(model, composed)
    composed.delta.merge(model)
    unverified, whole = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("unverified", "float32"))
    try:
        model.save(unverified if dtype == "fp32" else whole)
        del model
        if dtype != "fp32":
            # The sums are rounded once, when they are written, and not the weights before they are summed.
            load_family(str(whole), device=device, dtype=DTYPES[dtype]).save(unverified)
            shutil.rmtree(whole)
        _refuse_adapters(unverified)
        again = load_family(str(unverified), device=device, dtype=DTYPES[dtype])
        _refuse_overflow(again, dtype)
        difference = _largest_difference(wanted, _draw(again, composed))
        if dtype == "fp32" and difference > LARGEST_DIFFERENCE:
            raise UserError(f"the merged model differs by {difference}/255 from the erased one; {out} was not written")
        merged = Merged(difference=difference)
        if dtype != "fp32" or not composed.alone:
            merged = _rescored(merged, composed, again)
        _describe(unverified, composed, merged, dtype)
        os.replace(unverified, out)
    finally:
        for folder in (unverified, whole):
            shutil.rmtree(folder, ignore_errors=True)
    return merged


def _draw(model: Family, composed: Composition) -> list[Image]:
    """Images of a few pair prompts of every run, sampled as the first run samples."""
    recipes = [one.recipe for one in composed.erasures if one.recipe is not None]
    prompts: list[str] = []
    for recipe in recipes:
        pairs, n = load_concept(recipe.concept).pairs, 2 if len(recipes) == 1 else 1
        prompts += [*pairs.unsafe[:n], *pairs.safe[:n]]
    prompts = prompts or list(PROMPTS)
    sampling = recipes[0].sampling if recipes else Sampling()
    return model.generate(prompts, seeds=range(len(prompts)), sampling=sampling)


def _refuse_adapters(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            left = [key for key in file.keys() if any(mark in key for mark in ADAPTER_MARKS)]  # noqa: SIM118
        if left:
            raise UserError(f"{path.relative_to(folder)} still holds adapter weights ({left[0]}); nothing was written")


def _refuse_overflow(model: Family, dtype: str) -> None:
    for network in (model.denoiser, *model.encoders()):
        wrong = not_finite(dict(network.named_parameters()))
        if wrong is not None:
            way_out = "give the erasure less weight" if dtype == "fp32" else "merge with --dtype fp32, or bf16 for fp16"
            raise UserError(f"in {dtype} {wrong} holds NaN or infinity; {way_out}; nothing was written")


def _largest_difference(first: list[Image], second: list[Image]) -> int:
    return max(
        int(np.abs(np.asarray(a).astype(np.int16) - np.asarray(b).astype(np.int16)).max())
        for a, b in zip(first, second, strict=True)
    )


def _rescored(merged: Merged, composed: Composition, model: Family) -> Merged:
    """With the rates of the runs on the merged weights."""
    found: list[Rescored] = []
    unscored: list[Path] = []
    for one in composed.erasures:
        rates = None if one.recipe is None else rescore(one.path, one.recipe, model)
        if rates is None:
            unscored.append(one.path)
        else:
            found.append(rates)
    return Merged(difference=merged.difference, rescored=tuple(found), unscored=tuple(unscored))


def _describe(folder: Path, composed: Composition, merged: Merged, dtype: str) -> None:
    """Put the model card into the folder, and the texts of the base model's licence."""
    (folder / "README.md").write_text(
        merged_card.render(
            model=composed.model,
            parts=[
                merged_card.Part(
                    weight=weight,
                    record=one.delta.record,
                    concept=load_concept(one.recipe.concept).name if one.recipe else None,
                    run=one.path if one.recipe else None,
                )
                for one, weight in zip(composed.erasures, composed.weights, strict=True)
            ],
            dtype=dtype,
            difference=merged.difference,
            rescored=merged.rescored,
        ),
        encoding="utf-8",
    )
    for text in Licence.of(composed.model).texts:
        shutil.copyfile(text, folder / text.name)
