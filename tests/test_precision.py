"""Autocast with a way out of it, float32 adapters, networks that wait, and the lines that tell what is missing."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from duo import precision
from duo.delta import Delta
from duo.errors import UserError
from duo.families._flow import FlowProcess
from duo.pairs import Pairs
from duo.plugins import Precision, Sampling
from duo.precision import check_prior, prepare_denoiser, rounds, unrounded, waiting
from duo.training import attach_lora
from methods.test_duo import QUICK, RecordingRun


@pytest.fixture
def pairs() -> Pairs:
    safe = [Image.new("RGB", (64, 64), (40 * index, 90, 200 - 40 * index)) for index in range(3)]
    unsafe = [image.copy() for image in safe]
    for image in unsafe:
        ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill=(255, 120, 0))
    return Pairs(names=["0", "1", "2"], unsafe=unsafe, safe=safe)


def predicted(model: Any) -> torch.Tensor:
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.predict(x_t, torch.tensor([500, 999]), model.text([""]).expand(2))


def trained(model: Any, pairs: Pairs, folder: Path, settings: Precision, **changes: Any) -> tuple[Delta, list[Any]]:
    prepare_denoiser(model, settings)
    run = RecordingRun(folder, precision=settings)
    return replace(QUICK, max_train_steps=6, **changes).erase(model, None, pairs=pairs, run=run), run.rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_rounds_the_denoiser_and_can_be_left(tiny_sd: Any, dtype: Any) -> None:
    exact = predicted(tiny_sd)
    prepare_denoiser(tiny_sd, Precision(dtype=dtype))
    rounded = predicted(tiny_sd)
    assert rounds(tiny_sd.denoiser) and rounded.dtype == torch.float32
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < 4 * torch.finfo(getattr(torch, dtype)).eps * 4
    with unrounded(tiny_sd.denoiser):
        assert torch.equal(predicted(tiny_sd), exact)
    assert torch.equal(predicted(tiny_sd), rounded)
    drawn = tiny_sd.generate(["a red car"], seeds=[3], sampling=Sampling(num_inference_steps=2))[0]
    prepare_denoiser(tiny_sd, Precision())
    plain = tiny_sd.generate(["a red car"], seeds=[3], sampling=Sampling(num_inference_steps=2))[0]
    assert 0 < np.abs(np.asarray(drawn, dtype=int) - np.asarray(plain, dtype=int)).max() < 32
    assert not rounds(tiny_sd.denoiser) and torch.equal(predicted(tiny_sd), exact)


def test_the_prior_term_has_no_floor_of_rounding(tiny_sd: Any, pairs: Pairs, tmp_path: Path) -> None:
    """At a rate at which nothing moves far, λ = 5e6 times the prior stays what it is in float32."""
    changes = {"prior_weight": 5e6, "learning_rate": 1e-6, "weight_decay": 0.0}
    _, exact = trained(tiny_sd, pairs, tmp_path / "exact", Precision(), **changes)
    delta, rounded = trained(tiny_sd, pairs, tmp_path / "rounded", Precision(dtype="bfloat16"), **changes)
    assert all(value.dtype == torch.float32 for value in delta.tensors.values())
    for ours, theirs in zip(rounded, exact, strict=True):
        assert 5e6 * ours["prior"] < 5e6 * theirs["prior"] * 3 + 1e-3
    assert rounded[-1]["loss"] < 1


def test_an_adapter_is_float32_on_weights_that_are_not(tiny_sd: Any) -> None:
    tiny_sd.denoiser.to(torch.bfloat16)
    with attach_lora(tiny_sd.denoiser, list(tiny_sd.layers("self_attention")), rank=2, alpha=2.0, seed=1) as lora:
        assert {parameter.dtype for parameter in lora.parameters} == {torch.float32}


def test_weights_whose_rounding_would_drown_the_preference_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"precision\.weights is 'bfloat16'.*prior term about 13 at prior_weight 5e\+06"
    ):
        check_prior(5e6, Precision(weights="bfloat16"))
    with pytest.raises(UserError, match=r"prior term about 0\.2 "):
        check_prior(5e6, Precision(weights="float16"))
    check_prior(100.0, Precision(weights="bfloat16"))
    check_prior(5e6, Precision(dtype="bfloat16"))


def test_preconditioning_scales_what_rounding_does_to_the_prior(tmp_path: Path, pairs: Pairs) -> None:
    """λ = 5e6 at σ = 0.003 acts as 45, whose floor in bfloat16 is 45·2⁻¹⁴/24 = 1.1e-4; at σ = 1 it acts as it is."""
    half = Precision(weights="bfloat16")
    check_prior(5e6, half, scale=0.003)
    with pytest.raises(UserError, match=r"prior term about 1\.3 at prior_weight 5000, which .* makes 5e\+05;"):
        check_prior(5e3, half, scale=10.0)
    assert 45 * torch.finfo(torch.bfloat16).eps ** 2 / 24 == pytest.approx(1.144e-4, rel=1e-3)

    # So does the method: SD3's shift of 3 labels the fraction 0.001 with σ = 0.003.
    process = FlowProcess(shift=3.0, device=torch.device("cpu"))
    model: Any = types.SimpleNamespace(
        process=process, layers=lambda scope: [scope], latents=lambda *_, **__: pytest.fail("was let through")
    )
    method = replace(QUICK, prior_weight=5e6, prior_at=0.001)
    for change, refused in (({}, True), ({"precondition_outputs": True}, False)):
        run = RecordingRun(tmp_path, precision=half)
        with pytest.raises(UserError if refused else pytest.fail.Exception):
            replace(method, **change).erase(model, None, pairs=pairs, run=run)
    with pytest.raises(UserError, match="rounding alone"):
        replace(method, precondition_outputs=True, prior_at=1.0).erase(model, None, pairs=pairs, run=run)


def test_sharding_and_compiling_are_refused_together() -> None:
    with pytest.raises(ValueError, match="shard and torch_compile do not go together"):
        Precision(shard=True, torch_compile=True)


def test_checkpointing_and_offloading_change_no_result(tiny_sd: Any, pairs: Pairs, tmp_path: Path) -> None:
    plain, _ = trained(tiny_sd, pairs, tmp_path / "plain", Precision())
    low, _ = trained(tiny_sd, pairs, tmp_path / "low", Precision(gradient_checkpointing=True, offload=True))
    assert tiny_sd.denoiser.is_gradient_checkpointing
    for name, value in plain.tensors.items():
        assert torch.allclose(value, low.tensors[name], atol=1e-6), name


def test_networks_wait_on_the_cpu_and_come_back_even_after_an_error() -> None:
    class Traveller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places: list[str] = []

        def to(self, place: Any) -> Traveller:  # type: ignore[override]
            self.places.append(str(place))
            return self

    one = Traveller()
    with pytest.raises(KeyError), waiting([one], device=torch.device("meta"), offload=True):
        raise KeyError(one.places.copy())
    assert one.places == ["cpu", "meta"]
    with waiting([one], device=torch.device("meta"), offload=False):
        assert len(one.places) == 2


def test_the_encoders_are_all_but_the_denoiser(tiny_sd: Any, tiny_sdxl: Any) -> None:
    assert [type(one).__name__ for one in tiny_sd.encoders()] == ["AutoencoderKL", "CLIPTextModel"]
    assert len(tiny_sdxl.encoders()) == 3


def test_an_8_bit_optimiser_that_is_not_installed_is_told(
    tiny_sd: Any, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        trained(tiny_sd, pairs, tmp_path, Precision(optimizer_8bit=True))
    assert not list(tmp_path.iterdir())


def test_an_8_bit_optimiser_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    package, optim = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})  # type: ignore[attr-defined]
    monkeypatch.setattr(precision.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    parameters = nn.ParameterList([nn.Parameter(torch.ones(2))])
    made = precision.adamw(parameters, learning_rate=0.1, weight_decay=0.2, eight_bit=True)
    assert type(made).__name__ == "AdamW8bit" and made.defaults["weight_decay"] == 0.2


def test_a_precision_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'half', expected one of float32"):
        Precision(dtype="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is 'float16' but weights are 'bfloat16'"):
        Precision(dtype="float16", weights="bfloat16")


# --- the dry run ------------------------------------------------------------------------------------


def test_a_dry_run_counts_measures_and_writes_nothing(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_leaves: None
) -> None:
    import staged
    from duo.cli import main

    (tmp_path / "fire.toml").write_text(staged.CONCEPT)
    text = staged.RECIPE.replace('"tiny"', json.dumps(str(tiny_folder)))
    text = text.replace("guidance_scale = 1.0", "guidance_scale = 5.0").replace(
        'method = {name = "nudge"}', 'method = {name = "duo", train_batch_size = 2, max_train_steps = 10, rank = 2}'
    )
    (tmp_path / "recipe.toml").write_text(text)
    before = set(tmp_path.rglob("*"))
    assert main(["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert set(tmp_path.rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    counts = {line[:34].strip(): line[34:].split() for line in lines[2:10]}
    # PNDM takes a step more than it is asked for, and guidance two rows a step: 6 rows an image of 2 steps, and 4 of
    # the 1 step of an edit of strength 0.75.
    assert counts["pairs"][:3] == ["6", str(3 * 6 + 3 * 4), "0"]
    assert counts["erase"][:4] == ["0", str(10 * 2 * 3 * 2), str(10 * 2 * 3), "6"]
    assert counts["attack: prompts"][:2] == ["10", "60"]
    assert counts["score"][:2] == ["14", "84"]
    assert counts["attack: inversion"][0] == "8", "two prompts on two models, an image asked for in each search"
    assert int(counts["total"][0]) == 6 + 3 + 10 + 8 + 8 + 14
    assert any("s a step" in line for line in lines) and any("GiB at most on cpu" in line for line in lines)


def test_the_table_of_a_dry_run_keeps_its_columns_whatever_the_counts() -> None:
    from duo.stages.planning import HEADING, aligned

    lines = aligned([HEADING, ("pairs", "1999999999998", "98999999999901", "0", "2", "3", "0:01:00")])
    assert len({len(line) for line in lines}) == 1
    assert lines[0].index("images") + len("images") == lines[1].index("1999999999998") + 13
    assert lines[1].split() == ["pairs", "1999999999998", "98999999999901", "0", "2", "3", "0:01:00"]
