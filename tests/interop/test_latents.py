"""Normalisation per channel folded into the autoencoder: the same latents and images by one factor."""

import pytest
import torch
from tiny_model import AUTOENCODER, PER_CHANNEL, randomised

from ldm.interop.latents import fold, of_factor, originals, scaling_factor, unfold
from ldm.interop.model import Latents
from ldm.nets.autoencoder import KLAutoencoder


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomised(KLAutoencoder(**AUTOENCODER))


def folded(net, latents):
    other = KLAutoencoder(**AUTOENCODER)
    other.load_state_dict({**net.state_dict(), **fold(net.state_dict(), latents)})
    return other


def test_a_folded_autoencoder_has_normalised_latents(net):
    image, z = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 4, 4, 4)
    mean, std = PER_CHANNEL.mean.view(-1, 1, 1), PER_CHANNEL.std.view(-1, 1, 1)
    other = folded(net, PER_CHANNEL)
    with torch.no_grad():
        before, after = net.encode(image), other.encode(image)
        assert torch.allclose(after.mean, (before.mean - mean) / std, rtol=1e-5, atol=1e-5)
        assert torch.allclose(after.std, before.std / std, rtol=1e-5)
        assert torch.allclose(other.decode(z), net.decode(z * std + mean), rtol=1e-5, atol=1e-5)


def test_folding_the_identity_changes_no_bit(net):
    found = fold(net.state_dict(), Latents(torch.zeros(4), torch.ones(4)))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.items())


def test_folding_is_undone_bit_for_bit_unless_the_weights_changed(net):
    weights = net.state_dict()
    original, there = originals(weights, PER_CHANNEL), folded(net, PER_CHANNEL).state_dict()
    assert any(not torch.equal(there[name], weights[name]) for name in weights)
    again, latents = unfold(there, original)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert torch.equal(latents.mean, PER_CHANNEL.mean) and torch.equal(latents.std, PER_CHANNEL.std)
    there["post_quant_conv.bias"] = there["post_quant_conv.bias"] + 1e-3
    assert unfold(there, original) is None
    assert unfold(weights, {}) is None


@pytest.mark.parametrize("factor", [0.18215, 0.13025, 1.0, 2.0, 0.3611, 1 / 3])
def test_a_factor_comes_back_with_as_few_digits(factor):
    found = scaling_factor(of_factor(factor, 4))
    assert torch.equal(of_factor(found, 4).std, of_factor(factor, 4).std)
    assert len(str(found)) <= len(str(factor))
    assert found == factor or factor == 1 / 3


def test_every_single_deviation_has_a_factor():
    for std in torch.rand(200, generator=torch.Generator().manual_seed(0)) * 10 + 0.01:
        latents = Latents(torch.zeros(3), std.repeat(3))
        assert torch.equal(of_factor(scaling_factor(latents), 3).std, latents.std)


@pytest.mark.parametrize(
    "latents",
    [
        PER_CHANNEL,
        Latents(torch.tensor([0.0, 0.1]), torch.ones(2)),
        Latents(torch.zeros(2), torch.tensor([1.0, 2.0])),
    ],
)
def test_other_statistics_have_none(latents):
    assert scaling_factor(latents) is None
