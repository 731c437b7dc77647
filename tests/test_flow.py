import torch

from urae.flow import add_noise, flow_loss, sample_sigmas


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
