"""Moments of latents against draws and closed forms."""

import pytest
import torch

from ldm.latents.moments import LatentMoments, statistics


def test_they_are_those_of_many_draws():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(8, 3, 4, 4, generator=generator).double() ** 3 + torch.tensor([0.0, 1.0, -5.0]).view(
        3, 1, 1
    )
    std = torch.rand(8, 3, 4, 4, generator=generator).double()
    moments = LatentMoments(3)
    for part in (slice(0, 3), slice(3, 8)):
        moments.add(mean[part], std[part])
    found = statistics(moments.packed())
    noise = torch.randn(4000, *mean.shape, generator=generator, dtype=torch.float64)
    z = (mean + std * noise).movedim(2, 0).flatten(1)
    centred = z - z.mean(1, keepdim=True)
    assert torch.allclose(found.mean, z.mean(1), atol=0.01)
    assert torch.allclose(found.std, z.std(1), rtol=0.01)
    assert torch.allclose(found.kurtosis, centred.pow(4).mean(1) / z.var(1) ** 2, rtol=0.03)
    within = mean.movedim(1, 0).flatten(1).var(1, unbiased=False)
    assert torch.allclose(found.informative, within / found.std.square(), rtol=1e-6)


def test_a_channel_whose_posterior_is_the_prior_is_dead():
    mean = torch.zeros(4, 4, 8, 8)
    mean[:, 0] = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean[:, 1:] = torch.tensor([0.0, 0.1, 3.0]).view(3, 1, 1)  # a constant says nothing of the image
    moments = LatentMoments(4)
    moments.add(mean, torch.ones(4, 4, 8, 8))
    found = statistics(moments.packed())
    assert found.informative[1:].abs().max() < 1e-9
    assert found.kurtosis[1:].tolist() == pytest.approx([3.0] * 3)  # a normal distribution's
    summary = found.summary()
    assert summary["dead_channels"] == 0.75
    assert summary["latent_mean_max"] == pytest.approx(3.0) and summary["latent_std_min"] == pytest.approx(
        1.0
    )
