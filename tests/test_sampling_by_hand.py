"""Sampling by hand against diffusers' own schedulers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

import tiny_flow
from duo.sampling import grid, guided, inverted, partly_sampled

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


def test_one_round_takes_the_steps_of_ddim_backwards(tiny_sd) -> None:
    model = tiny_sd
    settings = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 0, "set_alpha_to_one": True}
    scheduler = DDIMInverseScheduler.from_config(model._scheduler.config, **settings)
    scheduler.set_timesteps(10)
    text, x_t = model.text(["a red house", "a boat"]), EPS
    assert scheduler.timesteps.flip(0).tolist() == grid(model, 10).tolist()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_t = scheduler.step(model.predict(x_t, t.expand(2), text), t, x_t).prev_sample
    torch.testing.assert_close(inverted(model, EPS, text, steps=10), x_t, atol=1e-3, rtol=1e-3)


def test_one_round_takes_the_steps_of_euler_backwards(vocabulary: Path) -> None:
    from duo.families.sd3 import Sd3

    model = Sd3(tiny_flow.sd3_pipeline(vocabulary), name="tiny")
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    text, times = model.text(["a red house", "a boat"]), [*grid(model, 5), torch.tensor(0.0)]
    ours = inverted(model, x_t, text, steps=5)
    with torch.no_grad():
        for t, s in reversed(list(pairwise(times))):
            x_t = x_t + (t - s) * model.predict(x_t, t.expand(2), text)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sd2_v", "sd3", "flux"])
def test_more_rounds_find_the_noise_that_the_image_was_made_of(
    kind: str, vocabulary: Path, request: pytest.FixtureRequest
) -> None:
    from duo.families.flux import Flux
    from duo.families.sd3 import Sd3

    flows = {"sd3": (Sd3, tiny_flow.sd3_pipeline), "flux": (Flux, tiny_flow.flux_pipeline)}
    if kind in flows:
        family, make = flows[kind]
        model = family(make(vocabulary), name="tiny")
    else:
        model = request.getfixturevalue(kind)
    eps = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    text = model.text(["a red house", "a boat"])
    last = partly_sampled(model, eps, text, text, steps=4, stop=3, guidance_scale=1.0)
    t = grid(model, 4)[3].expand(2)
    with torch.no_grad():
        x0, _ = model.process.implied(last, model.predict(last, t, text), t)
    missed = [(inverted(model, x0, text, steps=4, rounds=n) - eps).abs().mean().item() for n in (1, 2, 12)]
    assert missed[0] > missed[1] > 10 * missed[2]
    assert missed[2] < 1e-3
