"""What every method that trains must do, as checks for the tests of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.delta import Delta
from duo.errors import UserError
from duo.plugins import Precision
from recording import RecordingRun


def erase(method: Any, model: Any, concept: Any, run: RecordingRun) -> Delta:
    """The delta of a method that learns from no pairs."""
    return method.erase(model, concept, pairs=None, run=run)


def check_seeded(erased: Callable[[RecordingRun], Delta], folder: Path) -> Delta:
    """The same seed gives the same delta, which is returned, and another seed another one."""
    one, two, other = (
        erased(RecordingRun(folder / name, seed=seed)) for name, seed in (("one", 5), ("two", 5), ("other", 6))
    )
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert not all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    return one


def check_resumed(
    erased: Callable[[RecordingRun], Delta], folder: Path, *, stop_after: int, goes_on_at: int
) -> RecordingRun:
    """An erasure that is stopped ends, gone on with in `folder/stopped`, with the bytes of one that was not."""
    whole = erased(RecordingRun(folder / "whole"))
    with pytest.raises(KeyboardInterrupt):
        erased(RecordingRun(folder / "stopped", stop_after=stop_after))
    run = RecordingRun(folder / "stopped")
    resumed = erased(run)
    assert run.rows[0]["step"] == goes_on_at
    for name, delta in (("whole", whole), ("stopped", resumed)):
        delta.save(folder / name / "delta.safetensors")
    assert (folder / "whole/delta.safetensors").read_bytes() == (folder / "stopped/delta.safetensors").read_bytes()
    return run


def check_refused_before_drawing(method: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision weights and an optimizer that is not there are told by `check`, before anything is drawn."""
    method.check(model, pairs=None, precision=Precision(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"precision.weights is .float16.*set it to float32"):
        method.check(model, pairs=None, precision=Precision(weights="float16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        method.check(model, pairs=None, precision=Precision(optimizer_8bit=True))
