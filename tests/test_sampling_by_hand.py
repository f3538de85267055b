"""Sampling by hand against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny_flow
from duo.sampling import grid, guided, partly_sampled

EPS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2_v"])
def test_it_takes_the_steps_of_ddim(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    scheduler = DDIMScheduler.from_config(
        model._scheduler.config, timestep_spacing="trailing", clip_sample=False, steps_offset=0
    )
    scheduler.set_timesteps(10)
    assert grid(model, 10).tolist() == scheduler.timesteps.tolist()
    text, empty = model.text(["a red house", "a boat"]), model.text([""]).expand(2)
    x_t = EPS
    with torch.no_grad():
        for t in scheduler.timesteps[:6]:
            output = guided(model, x_t, t.expand(2), text, empty, scale=3.0)
            x_t = scheduler.step(output, t, x_t).prev_sample
    ours = partly_sampled(model, EPS, text, empty, steps=10, stop=6, guidance_scale=3.0)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)


def test_it_takes_the_steps_of_euler_on_a_flow(vocabulary) -> None:
    from duo.families.sd3 import Sd3

    model = Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model._scheduler.config)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    torch.testing.assert_close(grid(model, 10), scheduler.sigmas[:10])
    eps = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    text, empty = model.text(["a red house", "a boat"]), model.text([""]).expand(2)
    x_t = eps
    with torch.no_grad():
        for t, sigma in zip(scheduler.timesteps[:4], scheduler.sigmas[:4], strict=True):
            output = guided(model, x_t, sigma.expand(2), text, empty, scale=2.0)
            x_t = scheduler.step(output, t, x_t).prev_sample
    ours = partly_sampled(model, eps, text, empty, steps=10, stop=4, guidance_scale=2.0)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)


def test_no_steps_leave_the_noise_and_no_guidance_asks_once(tiny_sd) -> None:
    text, empty = tiny_sd.text(["a red house", "a boat"]), tiny_sd.text([""]).expand(2)
    assert torch.equal(partly_sampled(tiny_sd, EPS, text, empty, steps=10, stop=0, guidance_scale=3.0), EPS)
    t = torch.tensor([500, 20])
    with torch.no_grad():
        c, u = tiny_sd.predict(EPS, t, text), tiny_sd.predict(EPS, t, empty)
        torch.testing.assert_close(guided(tiny_sd, EPS, t, text, empty, scale=1.0), c)
        torch.testing.assert_close(
            guided(tiny_sd, EPS, t, text, empty, scale=4.0), u + 4 * (c - u), atol=1e-5, rtol=1e-5
        )
