"""Bake an erasure into a model's full weights, so that it cannot be unloaded, and prove it by loading them again.

Merging is not irreversibility: who has the base model has the concept. It only means that the folder that is passed on
holds no adapter that one call removes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from duo.concept import load_concept
from duo.delta import Delta
from duo.errors import UserError
from duo.fields import build
from duo.models import load_family
from duo.recipe import Recipe
from duo.rundir import RunDir, read_table

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from duo.plugins import Family

LARGEST_DIFFERENCE = 1  # of 255, in float32
ADAPTER_MARKS = ("lora_", "base_layer", "adapter")


def merge(run: Path, out: Path, *, device: torch.device | str = "cpu") -> int:
    """Write the erased model of a run to the new folder `out`, in the diffusers layout.

    The folder appears only once it is verified: loaded again, it holds no adapter weights and draws what the model with
    the delta attached draws. Returns the largest difference of a colour value, of 255.
    """
    if out.exists():
        raise UserError(f"{out} exists already; name a new folder")
    RunDir(run).stage("erase").require("erase")
    recipe = build(Recipe, read_table(run / "run.json", "recipe")["recipe"], f"{run / 'run.json'}: recipe")
    delta = Delta.load(run / "erase" / "delta.safetensors")
    model = load_family(recipe.model, device=device, config=recipe.model_config)
    with delta.attached(model):
        wanted = _draw(model, recipe)
    delta.merge(model)
    unverified = out.with_name(f".{out.name}.{os.getpid()}.unverified")
    try:
        model.save(unverified)
        _refuse_adapters(unverified)
        difference = _largest_difference(wanted, _draw(load_family(str(unverified), device=device), recipe))
        if difference > LARGEST_DIFFERENCE:
            raise UserError(f"the merged model differs by {difference}/255 from the erased one; {out} was not written")
        os.replace(unverified, out)
    finally:
        shutil.rmtree(unverified, ignore_errors=True)
    return difference


def _draw(model: Family, recipe: Recipe) -> list[Image]:
    pairs = load_concept(recipe.concept).pairs
    prompts = [*pairs.unsafe[:2], *pairs.safe[:2]]
    return model.generate(prompts, seeds=range(len(prompts)), sampling=recipe.sampling)


def _refuse_adapters(folder: Path) -> None:
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            left = [key for key in file.keys() if any(mark in key for mark in ADAPTER_MARKS)]  # noqa: SIM118
        if left:
            raise UserError(f"{path.relative_to(folder)} still holds adapter weights ({left[0]}); nothing was written")


def _largest_difference(first: list[Image], second: list[Image]) -> int:
    return max(
        int(np.abs(np.asarray(a).astype(np.int16) - np.asarray(b).astype(np.int16)).max())
        for a, b in zip(first, second, strict=True)
    )
