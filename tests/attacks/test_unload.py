from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from duo.attacks.unload import Unload
from duo.delta import Delta
from duo.methods.spm import Spm
from duo.plugins import Access, Attack, Sampling
from duo.target import AccessError, Target
from duo.training import attach_lora
from recording import RecordingRun
from small_fire import FAMILIES, SmallFire
from small_fire import family as tiny

NONE = {"adapters": 0, "hooks": 0, "parametrizations": 0}


def attempt(model: Any, published: Any, folder: Path) -> Any:
    """The one attempt, through the state as a stage keeps it: tensors."""
    attack = Unload(published=published)
    target = Target(model, access=attack.access, sampling=Sampling(), query_limit=attack.queries)
    state = attack.prepare(target, None, run=RecordingRun(folder))
    assert all(isinstance(one, torch.Tensor) for one in state.values())
    (one,) = attack.search(target, state, "a burning boat", generator=torch.Generator())
    assert (one.prompt, one.variant) == ("a burning boat", published)
    assert isinstance(attack, Attack)
    return one


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_dropped_and_what_is_merged_is_not(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = tiny(name, request)
    layers = sorted(model.layers("attention"))[:2]
    with attach_lora(model.denoiser, layers, rank=1, alpha=1, seed=0) as lora:
        beside = attempt(model, "merged", tmp_path)
        assert (beside.unloaded, beside.record) == (True, {**NONE, "adapters": 2})
        delta = Delta(kind="lora", component=model.component, tensors=lora.tensors(), record={})
    with delta.attached(model):
        assert attempt(model, "adapter", tmp_path).unloaded
        swapped = attempt(model, "merged", tmp_path)
        assert (swapped.unloaded, swapped.record) == (False, NONE)
    delta.merge(model)
    merged = attempt(model, "merged", tmp_path)
    assert (merged.unloaded, merged.record) == (False, NONE)


def test_the_claim_to_be_merged_is_not_believed(tiny_sd: Any, tmp_path: Path) -> None:
    """A gated erasure acts by hooks; other software may parametrize weights, or keep a low-rank part in the layer."""
    layer = tiny_sd.denoiser.get_submodule(sorted(tiny_sd.layers("attention"))[0])
    spm = Spm(max_train_steps=1, grid_steps=2, anchors=1, checkpointing_steps=9)
    gated = spm.erase(tiny_sd, SmallFire(tmp_path), pairs=None, run=RecordingRun(tmp_path / "spm"))
    with gated.attached(tiny_sd):
        found = attempt(tiny_sd, "merged", tmp_path)
        assert (found.unloaded, found.record) == (True, {**NONE, "hooks": len(gated.layers())})
    parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    assert attempt(tiny_sd, "merged", tmp_path).record == {**NONE, "parametrizations": 1}
    parametrize.remove_parametrizations(layer, "weight")
    layer.lora_layer = torch.nn.Linear(1, 1)
    found = attempt(tiny_sd, "merged", tmp_path)
    assert (found.unloaded, found.record) == (True, {**NONE, "adapters": 1})


def test_needs_the_weights(tiny_sd: Any, tmp_path: Path) -> None:
    target = Target(tiny_sd, access=Access.GRADIENT, sampling=Sampling())
    with pytest.raises(AccessError, match="denoiser"):
        Unload().prepare(target, None, run=RecordingRun(tmp_path))


def test_a_form_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"published is 'lora', expected one of adapter, merged"):
        Unload(published="lora")  # type: ignore[arg-type]
