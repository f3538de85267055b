"""`duo merge`: full weights, verified by loading them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from duo import merging, rundir
from duo.delta import Delta
from duo.errors import UserError
from duo.models import load_family
from duo.rundir import RunDir

CONCEPT = """
title = "Fire"
words = ["burning"]
anchor = "intact"
judge = {name = "toybox", hazard = "fire"}
curator = {name = "toybox", hazard = "fire", role = "curate"}
[pairs]
unsafe = ["a burning red house"]
safe = ["a red house"]
[prompts]
plain = ["a burning boat"]
"""


@pytest.fixture
def erased_run(tmp_path: Path, tiny_folder: Path) -> Path:
    """A run folder of which only the erasure is there."""
    (tmp_path / "fire.toml").write_text(CONCEPT)
    run = RunDir(tmp_path / "run")
    recipe = {
        "concept": str(tmp_path / "fire.toml"),
        "model": str(tiny_folder),
        "method": {"name": "duo"},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
    }
    run.describe({"recipe": recipe}, fixed={})
    model = load_family(str(tiny_folder), device="cpu")
    tensors = {}
    for name, layer in model.layers("self_attention").items():
        out, into = layer.weight.shape  # type: ignore[misc]
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=torch.Generator().manual_seed(0))
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=torch.Generator().manual_seed(1))
    stage = run.stage("erase")
    stage.begin({})
    Delta(kind="lora", tensors=tensors, record={}).save(stage.folder / "delta.safetensors")
    stage.finish()
    return run.path


def test_the_merged_folder_draws_what_the_erased_model_draws(
    erased_run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    out = tmp_path / "merged"
    assert merging.merge(erased_run, out) <= 1
    original, merged = (load_family(str(folder), device="cpu") for folder in (tiny_folder, out))
    delta = Delta.load(erased_run / "erase" / "delta.safetensors")
    name = next(iter(original.layers("self_attention")))
    wanted = original.layers("all")[name].weight + (
        delta.tensors[f"{name}.lora_B.weight"] @ delta.tensors[f"{name}.lora_A.weight"]
    )  # type: ignore[operator]
    torch.testing.assert_close(merged.layers("all")[name].weight, wanted)
    assert not list(tmp_path.glob(".merged*"))


def test_a_merge_that_did_nothing_is_caught(erased_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delta, "merge", lambda *_: None)
    with pytest.raises(UserError, match=r"the merged model differs by \d+/255"):
        merging.merge(erased_run, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_adapter_weights_that_are_left_are_caught(
    erased_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from duo.families.sd import Sd

    save = Sd.save

    def save_with_adapter(self: Any, folder: Path) -> None:
        save(self, folder)
        save_file({"attn1.lora_A.weight": torch.zeros(1)}, folder / "unet" / "adapter.safetensors")

    monkeypatch.setattr(Sd, "save", save_with_adapter)
    with pytest.raises(UserError, match=r"adapter\.safetensors still holds adapter weights \(attn1\.lora_A\.weight\)"):
        merging.merge(erased_run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_merged_over_a_folder_or_without_an_erasure(erased_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; name a new folder"):
        merging.merge(erased_run, erased_run)
    (erased_run / "erase" / "manifest.json").unlink()
    with pytest.raises(UserError, match="erase is not finished; run `duo erase` first"):
        merging.merge(erased_run, tmp_path / "merged")
    assert rundir.read_json(erased_run / "run.json")["schema"] == 1
