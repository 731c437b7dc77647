import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from urae.flow import (
    add_noise,
    find_resolution_shift,
    flow_loss,
    sample_sigmas,
    shift_sigmas,
)


def test_noise_path_ends():
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(add_noise(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(2)), noise)


def test_loss_of_the_true_velocity_is_zero_a_sample():
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    velocity = noise - latents
    velocity[1] += 2
    loss = flow_loss(velocity, latents, noise)
    assert loss.shape == (3,)
    assert torch.allclose(loss, torch.tensor([0.0, 4.0, 0.0]))


def test_sigmas_are_uniform_over_a_thousand_unshifted_steps():
    sigmas = sample_sigmas(20_000, torch.Generator().manual_seed(0))
    steps = sigmas * 1000
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert steps.min() >= 1
    assert steps.max() <= 1000
    # the mean of 20,000 uniform draws is within 4 standard errors (0.002) of 0.5
    assert abs(sigmas.mean() - 0.5005) < 4 * 0.289 / 20_000**0.5


def test_logit_normal_sigmas_are_most_often_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    sigmas = sample_sigmas(20_000, generator, "logit-normal")
    # of a standard normal number 68.3% are within 1, the sigmoid of which is 0.731
    middle = ((sigmas - 0.5).abs() < 0.2311).float().mean()
    assert abs(middle - 0.683) < 4 * (0.683 * 0.317 / 20_000) ** 0.5
    assert 0 < sigmas.min() and sigmas.max() < 1


def test_a_shift_is_that_of_the_scheduler():
    sigmas = torch.linspace(1.0, 0.001, 50)
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    assert torch.allclose(shift_sigmas(sigmas, 3.0), scheduler.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 4096, 16384])
def test_the_resolution_shift_is_that_of_stock_sampling(kind, tokens):
    sizes = {"base_image_seq_len": 100, "max_image_seq_len": 5000, "max_shift": 1.3}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, **sizes
    )
    sigmas = torch.linspace(1.0, 0.001, 50)
    mu = calculate_shift(tokens, 100, 5000, 0.5, 1.3)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    shift = find_resolution_shift(tokens, scheduler.config)
    assert torch.allclose(shift_sigmas(sigmas, shift), scheduler.sigmas[:-1], atol=1e-6)


def test_what_flux_makes_of_the_resolution_shift():
    config = FlowMatchEulerDiscreteScheduler().config
    shifts = [find_resolution_shift((side // 16) ** 2, config) for side in (1024, 2048, 4096)]
    assert shifts == pytest.approx([3.16, 25.3, 103_800], rel=2e-3)
