"""The benchmark of speed: its parts on shapes for a CPU. What it measures is not looked at here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duo.plugins import Sampling

ROOT = Path(__file__).parents[1]
SHORT = Sampling(num_inference_steps=2, guidance_scale=3.0)
OWN = (
    "growth",
    "growth_points",
    "noise_bank",
    "pages",
    "results",
    "scale",
    "speed",
    "speed_attacks",
    "speed_models",
    "speed_training",
    "sweeping",
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in OWN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", ["SD 1.4, 512²", "SDXL, 1024²", "SD3 medium, 1024²", "FLUX.1 dev, 1024²"])
def test_both_loops_run_on_each_real_architecture(family: str) -> None:
    import speed_models
    from speed_training import AUTHORS, Steps

    model, pairs, batch, precision = speed_models.real_size(f"training {family}", device="cpu", small=True)
    sides = Steps(model, pairs, AUTHORS, steps=1, batch=batch, precision=precision)
    assert sides.peer() > 0 < sides.ours()
    told = sides.told()
    assert told["amdahl_limit"] > 1
    assert 0 < told["utilisation"] < 1
    # SDXL starts guidance from zeros, and the peer from an encoded empty prompt.
    assert told["largest_relative_difference_of_losses"] < (1e-2 if "SDXL" in family else 1e-5)


def test_the_losses_of_the_peer_and_ours_are_the_same() -> None:
    import speed
    from speed_training import AUTHORS, Steps

    from duo.models import load_family

    model = load_family("toybox", device="cpu")
    images = model.generate(["a house", "a boat", "a house on fire", "a boat on fire"], seeds=range(4), sampling=SHORT)
    pairs = speed.Pairs(names=["0", "1"], unsafe=images[2:], safe=images[:2])
    sides = Steps(model, pairs, AUTHORS, steps=2, batch=2)
    assert sides.peer() > 0 < sides.ours()
    assert len(sides.losses["peer"]) == len(sides.losses["ours"]) == 3
    torch.testing.assert_close(torch.tensor(sides.losses["ours"]), torch.tensor(sides.losses["peer"]))


def test_a_bank_of_noise_asks_the_frozen_model_once_a_batch_and_has_the_loss_of_that_batch() -> None:
    import noise_bank
    import speed_models

    from duo.drawn import encode
    from duo.methods.duo import Duo
    from duo.training import attach_lora

    model, pairs, batch, _ = speed_models.real_size("training SD 1.4, 512²", device="cpu", small=True)
    method = Duo(train_batch_size=batch, beta=1.0, prior_weight=1.0)
    unsafe, safe = (encode(model, side) for side in (pairs.unsafe, pairs.safe))
    given = {"unsafe": unsafe, "safe": safe, "empty": model.unconditional()}
    with attach_lora(model.denoiser, model.layers("self_attention"), rank=2, alpha=2.0, seed=0) as lora:
        for up in (one for number, one in enumerate(lora.parameters) if number % 2):
            torch.nn.init.normal_(up)  # so that the trained model is not the frozen one
        plain = method._objective(model, lora, **given)
        wanted = {plain(torch.Generator().manual_seed(number))[0].item() for number in range(2)}
        asked: list[bool] = []
        predict = model.predict
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "predict", lambda *rows: asked.append(torch.is_grad_enabled()) or predict(*rows))
            banked = noise_bank.banked(2)(method, model, lora, **given)
            generator = torch.Generator().manual_seed(0)
            found = [banked(generator)[0].item() for _ in range(8)]
    assert set(found) == wanted and len(wanted) == 2
    assert asked.count(True) == 8 and asked.count(False) == 2


def test_points_of_growth_are_kept_where_code_and_machine_are_the_same(tmp_path: Path) -> None:
    import growth
    from growth_points import POINTS

    from duo.rundir import write_json

    assert {*growth.SIZES} == {*growth.WORDS} == {*POINTS}
    now = {"machine": "m", "threads": 1, "code": "c", "commit": "a"}
    write_json(tmp_path / "found.json", {**now, "found": {"1": {"n": 1}}})
    assert growth.kept(tmp_path / "found.json", {**now, "commit": "b"}) == {"1": {"n": 1}}
    for other in ({"machine": "n"}, {"code": "d"}, {"dirty": True}):
        assert growth.kept(tmp_path / "found.json", {**now, **other}) == {}
    assert growth.kept(tmp_path / "none.json", now) == {}


def test_bisection_finds_the_same_point_of_the_simplex_as_sorting() -> None:
    from speed_attacks import bisected

    from duo.attacks.unlearn_diff_atk import to_simplex

    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bisected(rows), to_simplex(rows), atol=1e-4, rtol=0)


def test_the_sides_take_turns_and_the_first_round_is_not_counted() -> None:
    import speed

    turns: list[str] = []

    def side(name: str, seconds: float) -> Any:
        return lambda: turns.append(name) or (100.0 if len(turns) < 3 else seconds)

    case = speed.Case(unit="thing", peer=side("peer", 0.4), ours=side("ours", 0.2), peer_is="slower", rounds=3)
    found = speed.measured(case, rounds=9)
    assert turns == ["peer", "ours"] * 4
    assert found["seconds"] == {"peer": 0.4, "ours": 0.2}
    assert found["ratio"] == {"low": 2.0, "median": 2.0, "high": 2.0}
    found["grown_mib"] = {"peer": 20.4, "ours": 10.2}
    assert speed.line("case", found) == "| case | thing | 400.0 | 200.0 | 5.0 | 2.00× (2.00–2.00) | 20 / 10 |"


def test_what_has_no_gpu_says_so_and_the_table_is_put_between_the_marks() -> None:
    import pages
    import speed

    row = speed.line("training FLUX", {"not_measured": speed.NO_GPU})
    assert row == "| training FLUX | not measured: no GPU | | | | | |"
    page = (ROOT / "docs" / "performance.md").read_text()
    changed = pages.put_between(page, row, by="bench")
    assert pages.put_between(changed, row, by="bench") == changed
    assert changed.count(row) == 1 and changed.endswith(page[-40:])


@pytest.mark.parametrize("damage", [("<!-- made", "<!-- m"), ("<!-- end of", "<!-- of"), ("<!-- end of", "<!-- made")])
def test_a_page_without_its_marks_is_told_by_the_mark(damage: tuple[str, str]) -> None:
    import pages

    page = "a\n<!-- made by make bench -->\nb\n<!-- end of what make bench made -->\nc"
    with pytest.raises(SystemExit, match="expected one"):
        pages.put_between(page.replace(*damage), "new", by="bench")
    swapped = "<!-- end of what make bench made -->\n<!-- made by make bench -->"
    with pytest.raises(SystemExit, match="expected it after"):
        pages.put_between(swapped, "new", by="bench")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts resident memory so")
def test_growth_is_of_the_side_alone() -> None:
    import speed

    _ = torch.zeros(100 * 2**18)  # 100 MiB that were there before and are free again
    del _
    grown = speed.grown(lambda: float(torch.zeros(30 * 2**18).sum()))
    assert 25 < grown < 60
