from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from duo.checkpoint import read_tensors, write_tensors
from duo.errors import UserError
from duo.training import Step, after_tuning, attach_lora, fit


class Quadratic:
    """Pull a vector to noisy targets; bursts of randomness so that a wrong generator state shows."""

    def __init__(self) -> None:
        self.parameters = nn.ParameterList([nn.Parameter(torch.tensor([4.0, -2.0]))])
        self.spoil_at = 0
        self.calls = 0

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.calls += 1
        error = self.parameters[0] - 0.1 * torch.randn(2, generator=generator)
        if self.calls == self.spoil_at:
            error = error * float("nan")
        return error.square().mean(), {"size": error.detach().abs().mean()}


def run(task: Quadratic, folder: Path, **changes: object) -> list[Step]:
    options: dict[str, object] = {
        "steps": 20,
        "learning_rate": 0.1,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "seed": 3,
        "folder": folder,
        "checkpointing_steps": 4,
        "record": {"beta": 2.0, "targets": ["a"]},
    }
    return list(fit(task, task.parameters, **{**options, **changes}))  # type: ignore[arg-type]


def test_the_loss_falls_and_each_step_is_told(tmp_path: Path) -> None:
    steps = run(Quadratic(), tmp_path, steps=60)
    assert steps[-1].loss < 0.1 * steps[0].loss
    assert [step.step for step in steps] == list(range(1, 61))
    assert (steps[0].total, steps[0].learning_rate) == (60, 0.1)
    assert steps[0].numbers["size"] == pytest.approx(3.0, abs=0.3)
    assert steps[0].grad_norm == pytest.approx(20**0.5, rel=0.1)  # before clipping


@pytest.mark.parametrize("schedule", [{}, {"lr_scheduler": "cosine", "lr_warmup_steps": 3}])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(tmp_path: Path, schedule: dict[str, Any]) -> None:
    whole = Quadratic()
    expected = run(whole, tmp_path / "whole", **schedule)
    stopped = Quadratic()
    for step in fit(
        stopped,
        stopped.parameters,
        steps=20,
        learning_rate=0.1,
        weight_decay=1e-2,
        max_grad_norm=1.0,
        seed=3,
        folder=tmp_path / "stopped",
        checkpointing_steps=4,
        record={"beta": 2.0, "targets": ["a"]},
        **schedule,
    ):
        if step.step == 11:  # between two checkpoints
            break
    resumed = Quadratic()
    steps = run(resumed, tmp_path / "stopped", **schedule)
    assert steps == expected[8:]
    assert torch.equal(resumed.parameters[0], whole.parameters[0])
    last = "checkpoint-0000020.safetensors"
    assert (tmp_path / "stopped" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_the_rate_follows_the_schedule(tmp_path: Path) -> None:
    rates = [step.learning_rate for step in run(Quadratic(), tmp_path, lr_scheduler="linear", lr_warmup_steps=4)]
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert rates[4:] == pytest.approx([0.1 * (20 - step) / 16 for step in range(4, 20)])


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = Quadratic()
    run(first, tmp_path, steps=6)
    again = Quadratic()
    assert run(again, tmp_path, steps=6) == []
    assert torch.equal(again.parameters[0], first.parameters[0])


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=8)
    with pytest.raises(UserError, match="holds a checkpoint of step 8, which is beyond step 6"):
        run(Quadratic(), tmp_path, steps=6)


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=18)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-0000016.safetensors", "checkpoint-0000018.safetensors"]


def test_a_loss_that_is_not_a_number_stops_the_run_and_spoils_nothing(tmp_path: Path) -> None:
    task = Quadratic()
    task.spoil_at = 7
    with pytest.raises(UserError, match=r"step 7: loss nan.*lower learning_rate \(now 0\.1\)"):
        run(task, tmp_path)
    assert torch.isfinite(task.parameters[0]).all()
    whole = Quadratic()
    expected = run(whole, tmp_path / "whole")
    assert run(Quadratic(), tmp_path) == expected[4:]


def test_the_last_good_checkpoint_is_not_the_one_that_the_loss_came_of(tmp_path: Path) -> None:
    task = Quadratic()
    task.spoil_at = 9
    with pytest.raises(UserError, match=r"step 9: .*the last good checkpoint is .*checkpoint-0000004\.safetensors$"):
        run(task, tmp_path)
    assert (tmp_path / "checkpoint-0000008.safetensors").exists()


def test_parameters_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    """Loss and gradient were, and the step itself was too large."""
    with pytest.raises(UserError, match=r"step 2: the parameters are not finite; lower learning_rate .*new --out$"):
        run(Quadratic(), tmp_path, learning_rate=3e37, weight_decay=3.0, checkpointing_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_step_is_kept_once_it_was_told(tmp_path: Path) -> None:
    """Who is killed as it logs a step takes it again: no log lacks a step that a checkpoint has."""
    task = Quadratic()
    steps = fit(
        task,
        task.parameters,
        steps=2,
        learning_rate=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=3,
        folder=tmp_path,
        checkpointing_steps=1,
        record={},
    )
    for step in (1, 2):
        assert next(steps).step == step
        assert not (tmp_path / f"checkpoint-{step:07d}.safetensors").exists()
    assert list(steps) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kill_as_old_checkpoints_go_leaves_no_more_of_them(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=8)
    (tmp_path / "checkpoint-0000001.safetensors").write_bytes(b"")
    assert run(Quadratic(), tmp_path, steps=8) == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-0000004.safetensors", "checkpoint-0000008.safetensors"]


@pytest.mark.parametrize("lost", ["module.adapter", "optimizer.0.exp_avg_sq", "optimizer.0.step", "generator"])
def test_a_checkpoint_that_lacks_any_part_of_the_state_would_show(tmp_path: Path, lost: str) -> None:
    """Weights, moments, the optimiser's count, and the generator that noise and batches are drawn from."""
    run(Quadratic(), tmp_path / "whole")
    run(Quadratic(), tmp_path / "lost", steps=8)
    path = tmp_path / "lost" / "checkpoint-0000008.safetensors"
    tensors, record = read_tensors(path)
    changed = {name: value for name, value in tensors.items() if name.startswith(lost)}
    assert changed
    start = torch.Generator().manual_seed(3).get_state()
    fresh = {name: start if name == "generator" else torch.zeros_like(value) for name, value in changed.items()}
    last = "checkpoint-0000020.safetensors"
    for parts, same in (({}, True), (fresh, False)):
        write_tensors(path, {**tensors, **parts}, record)
        run(Quadratic(), tmp_path / "lost")
        assert ((tmp_path / "lost" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()) is same
        for newer in set((tmp_path / "lost").iterdir()) - {path}:
            newer.unlink()


def test_an_infinite_gradient_stops_the_run(tmp_path: Path) -> None:
    parameters = nn.ParameterList([nn.Parameter(torch.zeros(1))])

    def root(_: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        return parameters[0].sqrt().sum(), {}

    with pytest.raises(UserError, match=r"step 1: loss 0\.0, gradient norm inf"):
        list(
            fit(
                root,
                parameters,
                steps=2,
                learning_rate=0.1,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=0,
                folder=tmp_path,
                checkpointing_steps=1,
                record={},
            )
        )
    assert parameters[0].item() == 0


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=4)
    with pytest.raises(UserError, match="made with another beta, rank;"):
        run(Quadratic(), tmp_path, record={"beta": 3.0, "targets": ["a"], "rank": 4})


def test_checkpoints_from_before_a_setting_are_gone_on_with_at_its_default(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=4)
    later = {"beta": 2.0, "targets": ["a"], "rank": 4}
    with pytest.raises(UserError, match="made with another rank;"):
        run(Quadratic(), tmp_path, record=later, defaults={"rank": 8})
    assert len(run(Quadratic(), tmp_path, record=later, defaults={"rank": 4, "unknown": 1})) == 16


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run(Quadratic(), tmp_path, steps=8)
    newest = tmp_path / "checkpoint-0000008.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint-0000008\.safetensors cannot be read as safetensors"):
        run(Quadratic(), tmp_path)
    newest.unlink()
    assert len(run(Quadratic(), tmp_path, steps=8)) == 4


def test_a_lora_starts_as_the_reference_and_leaves_no_trace(tiny_sd) -> None:
    denoiser, layers = tiny_sd.denoiser, list(tiny_sd.layers("attention")) + list(tiny_sd.layers("convolutions"))
    x_t, t, text = torch.ones(1, 4, 16, 16), torch.tensor([5]), tiny_sd.text([""])
    before, modules = tiny_sd.predict(x_t, t, text), dict(denoiser.named_modules())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with attach_lora(denoiser, layers, rank=2, alpha=2.0, seed=7) as lora:
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(tiny_sd.predict(x_t, t, text), before)
        trainable = {id(parameter) for parameter in denoiser.parameters() if parameter.requires_grad}
        assert trainable == {id(parameter) for parameter in lora.parameters}
        first = lora.tensors()
        for parameter in lora.parameters:
            parameter.data.add_(0.1)
        assert not torch.allclose(tiny_sd.predict(x_t, t, text), before)
        with lora.disabled():
            reference = tiny_sd.predict(x_t, t, text)
            assert torch.equal(reference, before)
            assert not reference.requires_grad
        assert tiny_sd.predict(x_t, t, text).requires_grad
    assert dict(denoiser.named_modules()) == modules
    assert not hasattr(denoiser, "peft_config")
    assert torch.equal(tiny_sd.predict(x_t, t, text), before)

    # The draw depends on the seed alone: N(0, 1/rank²) in A, zero in B.
    torch.manual_seed(99)
    with attach_lora(denoiser, layers, rank=2, alpha=2.0, seed=7) as lora:
        second = lora.tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.cat([v.flatten() for k, v in first.items() if "lora_A" in k]).std().item() == pytest.approx(
        0.5, rel=0.05
    )
    assert not any(v.any() for k, v in first.items() if "lora_B" in k)


def test_a_lora_is_taken_off_after_an_error(tiny_sd) -> None:
    modules = dict(tiny_sd.denoiser.named_modules())
    layers = list(tiny_sd.layers("self_attention"))
    with pytest.raises(RuntimeError, match="within"), attach_lora(tiny_sd.denoiser, layers, rank=2, alpha=2.0, seed=7):
        raise RuntimeError("within")
    assert dict(tiny_sd.denoiser.named_modules()) == modules


def test_what_a_loss_is_after_tuning_by_hand() -> None:
    """Tuning Σθ² from (3, −4) by steps of a root mean square of 0.5; the loss is Σ3θ²."""
    theta = nn.Parameter(torch.tensor([3.0, -4.0]))
    whole = theta.square().sum()  # a graph from before does not matter, as long as its backward comes first
    whole.backward()
    theta.grad = None
    there = torch.tensor([3.0, -4.0])
    for _ in range(2):
        slope = 2 * there
        there = there - 0.5 * slope / slope.square().mean().sqrt()
    told = after_tuning(lambda: 3 * theta.square().sum(), lambda: theta.square().sum(), [theta], steps=2, rate=0.5)
    assert told.item() == pytest.approx(3 * there.square().sum().item(), rel=1e-5)
    assert theta.tolist() == [3.0, -4.0]
    (0.5 * told + theta.square().sum()).backward()
    assert theta.grad is not None
    assert torch.allclose(theta.grad, 0.5 * 6 * there + 2 * torch.tensor([3.0, -4.0]))


def test_parameters_are_put_back_after_an_error_in_tuning() -> None:
    theta = nn.Parameter(torch.tensor([1.0, 2.0]))

    def broken() -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        after_tuning(broken, lambda: theta.square().sum(), [theta], steps=1, rate=0.5)
    assert theta.tolist() == [1.0, 2.0]
