from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from duo.errors import UserError
from duo.families._flow import FlowProcess
from duo.families._sampling import size_within
from duo.families._text import split_tokens
from duo.losses import squared_error

CPU = torch.device("cpu")
SD3 = FlowProcess(shift=3.0, device=CPU)


def of(scheduler: object, *, image_tokens: int = 256) -> FlowProcess:
    return FlowProcess.of(scheduler, image_tokens=image_tokens, model="m", device=CPU)


def test_noised_equals_the_scheduler_at_all_its_times() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, eps = torch.randn(2, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ours = of(scheduler).noised(x0, eps, scheduler.timesteps / 1000)
    torch.testing.assert_close(ours, scheduler.scale_noise(x0, scheduler.timesteps, eps), rtol=0, atol=1e-5)


def test_the_target_points_from_the_image_to_the_noise() -> None:
    x0, eps = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t, v = SD3.noised(x0, eps, t), SD3.target(x0, eps, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[2], eps[2])
    torch.testing.assert_close(x_t[1] - 0.25 * v[1], x0[1])
    torch.testing.assert_close(x_t[1] + 0.75 * v[1], eps[1])
    # A sampler that is given the target as prediction goes along the very path that `noised` lays out.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x = eps
    for step, time in enumerate(scheduler.timesteps):
        x = scheduler.step(SD3.target(x0, eps, t), time, x, return_dict=False)[0]
        torch.testing.assert_close(x, SD3.noised(x0, eps, scheduler.sigmas[step + 1].expand(3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", [{"shift": 3.0}, {"shift": 1.0}, {"use_dynamic_shifting": True}])
def test_the_terminal_point_is_where_samplers_start(scheduler: dict) -> None:
    sampler = FlowMatchEulerDiscreteScheduler(**scheduler)
    eps = torch.randn(2, 4, 2, 2)
    x, t = of(sampler).terminal(eps)
    assert x is eps
    assert t.tolist() == [1.0, 1.0]
    sampler.set_timesteps(5, **({"mu": 0.7} if "use_dynamic_shifting" in scheduler else {}))
    assert sampler.sigmas[0].item() == pytest.approx(1.0)
    torch.testing.assert_close(of(sampler).noised(torch.randn(2, 4, 2, 2), eps, t), eps)


def test_an_error_in_the_clean_image_is_sigma_times_that_of_the_prediction() -> None:
    x0, eps = torch.randn(2, 2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 0.2])
    wrong = SD3.target(x0, eps, t) + 2
    clean = SD3.noised(x0, eps, t) - t.view(-1, 1, 1, 1) * wrong
    errors = (clean - x0).square().mean((1, 2, 3))
    torch.testing.assert_close(errors, torch.tensor([1.0, 0.16]))  # σ²·2²
    torch.testing.assert_close(squared_error(wrong, SD3.target(x0, eps, t), scale=SD3.x0_scale(t)), errors)


def test_the_starting_noise_can_be_labelled_otherwise() -> None:
    eps = torch.randn(2, 4, 2, 2)
    x, t = SD3.terminal(eps, at=0.001)
    assert x is eps
    assert t.tolist() == pytest.approx([0.003 / 1.002] * 2)
    # The last of diffusers' training times, which run from noise to clean: what the authors' code takes for T.
    assert 1000 * t[0].item() == pytest.approx(FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps[999].item())


def test_fractions_run_from_clean_to_noise_with_the_shift() -> None:
    fractions = torch.tensor([0.0, 0.5, 0.75, 1.0])
    torch.testing.assert_close(SD3.sigma(fractions), torch.tensor([0.0, 0.75, 0.9, 1.0]))  # 3u/(1 + 2u)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(of(scheduler).sigma(torch.arange(1000, 0, -1) / 1000), scheduler.sigmas)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_is_that_of_the_models_size(kind: str, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, time_shift_type=kind)
    process = of(scheduler, image_tokens=tokens)
    mu = {256: 0.5, 1024: 0.63, 4096: 1.15}[tokens]
    assert process.shift == pytest.approx(math.exp(mu) if kind == "exponential" else mu)
    u = torch.linspace(0.01, 1, 50)
    torch.testing.assert_close(process.sigma(u), scheduler.time_shift(mu, 1.0, u))


def test_times_fill_the_range_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    t = SD3.sample_t(20_000, low=0.0, high=0.75, generator=generator)
    assert t.dtype == torch.float32
    assert 0 <= t.min() < 0.001
    assert 0.8999 < t.max() <= 0.9
    assert (t < 0.75).float().mean().item() == pytest.approx(2 / 3, abs=0.02)  # u below 0.5, of 0.75
    high = SD3.sample_t(1000, low=0.75, high=1.0, generator=generator)
    assert high.min() >= 0.9 - 1e-6


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        (DDIMScheduler(), "a DDIMScheduler is not supported"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "Scheduler with invert_sigmas is not supported"),
    ],
)
def test_other_schedulers_are_refused(scheduler: object, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        of(scheduler)
    assert "\n" not in str(caught.value)


def test_a_word_learned_elsewhere_is_refused() -> None:
    encoders = [
        SimpleNamespace(get_input_embeddings=lambda width=width: torch.nn.Embedding(5, width)) for width in (2, 3)
    ]
    with pytest.raises(UserError, match=r"<x> has vectors of width 2, .* take 2 \+ 3 = 5; learn it on this model"):
        split_tokens({"<x>": torch.ones(1, 2)}, encoders)
    first, second = split_tokens({"<x>": torch.arange(5.0)[None]}, encoders)
    assert (first["<x>"].tolist(), second["<x>"].tolist()) == ([[0, 1]], [[2, 3, 4]])


def test_sides_are_whole_patches() -> None:
    assert size_within([SimpleNamespace(size=(70, 33))], 16) == {"height": 32, "width": 64}  # type: ignore[list-item]
    with pytest.raises(UserError, match="15×40 is too small for this model; it needs at least 16"):
        size_within([SimpleNamespace(size=(15, 40))], 16)  # type: ignore[list-item]
