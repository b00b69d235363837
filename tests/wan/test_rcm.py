"""Samplers: noise levels by closed form, and where rCM lands with a velocity that is known."""

import math

import pytest
import torch
from wan_models import build_pipeline

from slagen.wan.rcm import RCMScheduler
from slagen.wan.samplers import set_sampler

ANGLES = (1.5, 1.4, 1.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_noise_levels(steps):
    scheduler = RCMScheduler()
    scheduler.set_timesteps(steps)
    # tan a = sigma, and t = sigma / (1 + sigma)
    exact = [80 / 81, *(math.tan(a) / (1 + math.tan(a)) for a in ANGLES[: steps - 1]), 0.0]
    assert scheduler.sigmas.tolist() == pytest.approx(exact, rel=1e-12, abs=1e-15)
    assert scheduler.timesteps.tolist() == [988, 932, 852, 608][:steps]


def test_timesteps_may_stay_exact():
    scheduler = RCMScheduler(round_timesteps=False, sigma_max=200.0)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * 200 / 201, 933.781], rel=1e-6)


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_true_velocity_leads_to_the_video(steps, stochastic):
    """On the straight path x = (1 - t) x0 + t e the velocity e - x0 leads to x0 in both forms, from any level."""
    scheduler = RCMScheduler(stochastic=stochastic)
    scheduler.generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    x0 = torch.randn(1, 4, 3, 4, 4, dtype=torch.float64)
    x = scheduler.initial_latents(tuple(x0.shape))
    for timestep, level in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        velocity = (x - x0) / level  # whatever x is, this points from x0 to it
        (x,) = scheduler.step(velocity, timestep, x, return_dict=False)
        assert x.dtype == torch.float64
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-13)


def test_a_linear_velocity_has_a_closed_form():
    """v = c x: the ODE form multiplies x by 1 - (t - t') c in every step."""
    scheduler = RCMScheduler(stochastic=False)
    scheduler.set_timesteps(4)
    x = start = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64)
    factor = 1.0
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(0.7 * x, timestep, x).prev_sample
        factor *= 1 - 0.7 * (scheduler.sigmas[i] - scheduler.sigmas[i + 1]).item()
    torch.testing.assert_close(x, start * factor, rtol=1e-12, atol=0)


def test_a_zero_velocity_keeps_the_video_and_adds_fresh_noise():
    """v = 0: x0 is x itself, so each step is (1 - t') x + t' noise, with the noise of one generator in order."""
    scheduler = RCMScheduler()
    scheduler.generator = torch.Generator().manual_seed(11)
    scheduler.set_timesteps(3)
    shape = (1, 2, 1, 2, 2)
    twin = torch.Generator().manual_seed(11)
    x = scheduler.initial_latents(shape)
    expected = torch.randn(shape, generator=twin).double() * (80 / 81)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=0)
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.zeros(shape), timestep, x).prev_sample
        following = scheduler.sigmas[i + 1].item()
        expected = (1 - following) * expected + following * torch.randn(shape, generator=twin).double()
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-15)


def test_steps_are_limited_and_counted():
    scheduler = RCMScheduler()
    with pytest.raises(ValueError, match="1 to 4 steps, not 5"):
        scheduler.set_timesteps(5)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        scheduler.step(torch.zeros(1), 988, torch.zeros(1))


def test_it_drives_the_diffusers_pipeline():
    pipe = build_pipeline()
    pipe.scheduler = RCMScheduler()
    pipe.set_progress_bar_config(disable=True)

    def latents():
        pipe.scheduler.generator = torch.Generator().manual_seed(0)
        return pipe(
            prompt="a red circle", height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
            max_sequence_length=8, output_type="latent", latents=pipe.scheduler.initial_latents((1, 4, 3, 8, 8)),
        ).frames  # fmt: skip

    first = latents()
    assert first.dtype == torch.float64 and torch.isfinite(first).all()
    assert torch.equal(first, latents())


def test_saved_and_read_again(tmp_path):
    RCMScheduler(sigma_max=200.0, stochastic=False).save_pretrained(tmp_path)
    again = RCMScheduler.from_pretrained(tmp_path)
    assert again.config.sigma_max == 200 and again.config.stochastic is False


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("sampler", ["unipc", "euler", "dpm++"])
def test_noise_levels_of_the_flow_samplers(sampler, shift):
    """s' = k s / (1 + (k - 1) s) of an even grid, and a last level of 0."""
    pipe = build_pipeline()
    set_sampler(pipe, sampler, shift)
    pipe.scheduler.set_timesteps(8)
    found = pipe.scheduler.sigmas.double()
    if sampler == "euler":  # from the first to the last of its 1,000 shifted levels, shifted again as diffusers does
        first, last = (shift * s / (1 + (shift - 1) * s) for s in (1.0, 1 / 1000))
        grid = torch.linspace(first, last, 8, dtype=torch.float64)
    elif sampler == "dpm++":
        grid = torch.linspace(0.999, 0, 9, dtype=torch.float64)[:-1]
    else:
        grid = torch.linspace(1, 1 / 1000, 9, dtype=torch.float64)[:-1]
    exact = shift * grid / (1 + (shift - 1) * grid)
    torch.testing.assert_close(found[:-1], exact, rtol=0, atol=2e-4)
    assert found[-1] < 1e-3
