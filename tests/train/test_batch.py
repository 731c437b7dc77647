"""How a batch is drawn: from the seed and the samples' counters, by the recipe's rules."""

from dataclasses import replace

import pytest
import torch

from urae.flow import find_resolution_shift, shift_sigmas
from urae.train.batch import sample_batch
from urae.train.inputs import check_inputs

CPU = torch.device("cpu")


def draw(inputs, **changes):
    samples = inputs.samples[:1] * 8
    return sample_batch(samples, range(8), replace(inputs.draws, **changes), CPU)


def test_what_was_drawn_before_is_drawn_again(settings):
    """The defaults give the sigmas that runs began with before there was a choice."""
    batch = draw(check_inputs(settings()))
    wanted = torch.tensor([384.0, 667, 451, 560, 359, 904, 381, 995]) / 1000
    assert torch.equal(batch.sigmas, wanted)


def test_a_rule_changes_the_sigmas_alone(settings):
    inputs = check_inputs(settings())
    plain = draw(inputs)
    for changes in ({"timestep_sampling": "logit-normal"}, {"timestep_shift": 3.0}):
        other = draw(inputs, **changes)
        assert not torch.equal(other.sigmas, plain.sigmas)
        assert torch.equal(other.noise, plain.noise)
        assert torch.equal(other.latents, plain.latents)
        assert torch.equal(other.prompt_embeds, plain.prompt_embeds)
        assert torch.equal(other.sigmas, draw(inputs, **changes).sigmas)


def test_latents_of_another_size_than_at_the_start_are_refused(settings):
    inputs = check_inputs(settings())
    sample = replace(inputs.samples[0], height=512)
    with pytest.raises(
        ValueError, match=r"has changed since the run began.* in place of \d+ x 512"
    ):
        sample_batch([sample], [0], inputs.draws, CPU)


def test_the_shift_follows_the_samples_size(settings):
    inputs = check_inputs(settings(timestep_shift="resolution"))
    assert inputs.draws.scheduler["max_image_seq_len"] == 4096
    small, large = (replace(inputs.samples[0], height=side, width=side) for side in (256, 1024))
    assert inputs.draws.shift(small) == pytest.approx(1.6487, rel=1e-4)  # e^0.5
    assert inputs.draws.shift(large) == pytest.approx(3.1582, rel=1e-4)  # e^1.15
    sample = inputs.samples[0]
    tokens = sample.height * sample.width // 256
    plain, shifted = draw(inputs, timestep_shift=1.0), draw(inputs)
    shift = find_resolution_shift(tokens, inputs.draws.scheduler)
    assert torch.allclose(shifted.sigmas, shift_sigmas(plain.sigmas, shift))
