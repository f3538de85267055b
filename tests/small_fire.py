"""A concept of a few words as methods that erase by text may see it, and tiny models of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duo.concept import load_concept

CONCEPT = """
title = "Fire"
words = ["burning", "on fire"]
anchor = "intact"
vector_pairs = [["a burning boat", "a boat"], ["a car on fire", "a car"], ["a burning car", "a car"]]
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
[pairs]
unsafe = ["a burning red house", "a red house on fire", "a burning blue car"]
safe = ["a red house", "a red house", "a blue car"]
[prompts]
plain = ["a burning boat"]
"""
FAMILIES = ("tiny_sd", "tiny_sd2_v", "tiny_sdxl", "sd3", "flux")
MAY_SEE = {"words", "anchor", "targets", "harmless"}


class SmallFire:
    """The concept above; whatever a method may not know is not there."""

    def __init__(self, folder: Path) -> None:
        path = folder / "small-fire.toml"
        path.write_text(CONCEPT)
        self._concept = load_concept(path)

    def __getattr__(self, name: str) -> Any:
        if name not in MAY_SEE:
            raise AssertionError(f"the method looked at concept.{name}")
        return getattr(self._concept, name)


def family(name: str, request: pytest.FixtureRequest) -> Any:
    """A fresh tiny model, one of `FAMILIES`."""
    import tiny_flow
    from duo.families.flux import Flux
    from duo.families.sd3 import Sd3

    if name == "sd3":
        return Sd3(tiny_flow.sd3_pipeline(request.getfixturevalue("vocabulary")), name=name)
    if name == "flux":
        return Flux(tiny_flow.flux_pipeline(request.getfixturevalue("vocabulary")), name=name)
    return request.getfixturevalue(name)


def changed(model: Any, delta: Any) -> set[str]:
    """The names of the denoiser's tensors that are others while the delta is attached."""
    before = {name: tensor.clone() for name, tensor in model.denoiser.state_dict().items()}
    with delta.attached(model):
        after = model.denoiser.state_dict()
        return {name for name in before if not before[name].equal(after[name])}
