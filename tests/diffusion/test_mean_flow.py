"""MeanFlow on a law whose average velocities are known: data N(m, s**2), on the line to N(0, 1)."""

import pytest
import torch
from tiny_model import randomised
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.mean_flow import MeanFlow
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.mean_flow import MeanFlowSampler
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.nets.unet import UNet
from ldm.rng import SampleNoise
from ldm.types import Cond, DenoiserDims

M, S, T = 0.7, 0.4, 1000


def std(t):
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def path(z, t, r):
    """Where the flow of the law takes z from time t to r: quantiles stay."""
    return (1 - r) * M + std(r) / std(t) * (z - (1 - t) * M)


def velocity(z, t):
    slope = (t - (1 - t) * S**2) / std(t) ** 2
    return -M + slope * (z - (1 - t) * M)


def times_of(times, z):
    """t and r of what the network gets: t less a timestep, and t - r."""
    shape = (-1,) + (1,) * (z.ndim - 1)
    t = (times[:, 0] + 1 / T).view(shape)
    return t, t - times[:, 1].view(shape)


def average(z, times):
    """The network that knows: u(z, r, t), and its limit, the velocity, where r = t."""
    t, r = times_of(times, z)
    interval = torch.where(t == r, torch.ones_like(t), t - r)
    return torch.where(t == r, velocity(z, t), (z - path(z, t, r)) / interval)


def test_the_average_velocity_satisfies_the_identity():
    z = torch.randn(5, 1, 1, 1).double()
    times = torch.tensor([[0.9, 0.3], [0.5, 0.5], [0.1, 0.02], [0.999, 1], [0.04, 0.005]]).double()
    t, r = times_of(times, z)
    u, slope = jvp(average, (z, times), (velocity(z, t), torch.ones_like(times)))
    torch.testing.assert_close(u, velocity(z, t) - (t - r) * slope)


@pytest.mark.parametrize("improved", [True, False])
def test_the_network_that_knows_has_no_gradient(improved):
    """At the truth E[V - (eps - x0) | z] = 0, so that a shift of u by a function of z gains nothing."""
    objective = MeanFlow(ratio=1.0, improved=improved, power=0.0)
    count = 400_000
    x0, noise = M + S * torch.randn(count, 1, 1, 1), torch.randn(count, 1, 1, 1)
    t = torch.tensor([[700.0, 250.0]]).expand(count, 2)
    shift = torch.zeros(2, requires_grad=True)
    model = lambda z, times: average(z, times) + shift[0] + shift[1] * z.detach()  # noqa: E731
    objective.training_loss(model, x0, noise, t).mean().backward()
    assert shift.grad.abs().max() < 0.02, "five standard deviations"
    wrong = lambda z, times: average(z, times) + 0.1 + shift[0]  # noqa: E731
    shift.grad = None
    objective.training_loss(wrong, x0, noise, t).mean().backward()
    assert shift.grad[0] > 0.1


def test_one_step_and_four_take_noise_to_the_law():
    x = torch.randn(50_000, 1, 1, 1)
    objective = MeanFlow()
    denoise = objective.denoiser(average)
    exact = path(x.double(), torch.tensor(1.0).double(), torch.tensor(0.0).double())
    for count in (1, 2, 4):
        sampler = MeanFlowSampler(count)
        drawn = sampler(denoise, sampler.steps(objective.schedule), x)
        torch.testing.assert_close(drawn.double(), exact, rtol=1e-4, atol=1e-4)
    euler = DDIM(1)
    once = euler(denoise, euler.steps(objective.schedule), x)
    assert once.std() < 1e-3, "with the velocity alone one step ends at the mean"
    many = DDIM(200)
    torch.testing.assert_close(
        many(denoise, many.steps(objective.schedule), x).double(), exact, rtol=0.02, atol=0.02
    )


def test_times_are_ordered_and_as_often_apart_as_asked():
    objective, count = MeanFlow(ratio=0.25), 8000
    keys = [str(i) for i in range(count)]
    t, eps = objective.draw(torch.zeros(count, 1, 1, 1), SampleNoise(0, keys), torch.arange(count))
    assert t.shape == (count, 2) and t.dtype == torch.float32 and eps.shape == (count, 1, 1, 1)
    apart = (t[:, 0] > t[:, 1]).double().mean().item()
    assert (t[:, 0] >= t[:, 1]).all() and abs(apart - 0.25) < 0.03
    alone, _ = objective.draw(torch.zeros(3, 1, 1, 1), SampleNoise(0, keys[:3]), torch.arange(3))
    assert torch.equal(alone, t[:3]), "a function of the sample"
    outside, _ = objective.draw(torch.zeros(9, 1, 1, 1), SampleNoise(0, keys[:9]))
    assert torch.equal(outside[:, 0], outside[:, 1])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_real_networks_have_the_derivative_and_learn(kind):
    torch.manual_seed(0)
    widths = DenoiserDims(sample=1, vector=8, times=2)
    options = DiTOptions(positions="both", qk_norm=True, swiglu=True, value_residual=True)
    net = (
        DiT(widths, 2, 16, 2, 2, options) if kind == "dit" else UNet(widths, (8, 16), 1, (False, True), 2, 4)
    )
    net = randomised(net)
    objective, cond = MeanFlow(ratio=1.0, power=0.0), Cond(vector=torch.randn(4, 8))
    x0, noise = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    t = torch.tensor([[900.0, 300], [500, 100], [100, 20], [999, -1]])
    model = lambda x, t: net(x, t, cond)  # noqa: E731
    loss = objective.training_loss(model, x0, noise, t)
    loss.sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    sigma = ((t[:, 0] + 1) / T).view(-1, 1, 1, 1)
    z, times = (1 - sigma) * x0 + sigma * noise, torch.stack([t[:, 0], t[:, 0] - t[:, 1]], 1) / T
    net.double()
    cond = Cond(vector=cond.vector.double())
    z, times, step = z.double(), times.double(), 1e-4
    with torch.no_grad():
        own = model(z, torch.stack([times[:, 0], torch.zeros(4).double()], 1))
        ahead, behind = (model(z + s * own, times + s) for s in (step, -step))
        slope = (ahead - behind) / (2 * step)
        interval = ((t[:, 0] - t[:, 1]) / T).view(-1, 1, 1, 1)
        expected = (model(z, times) + interval * slope - (noise - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)


def test_the_derivative_of_the_time_is_no_larger_than_that_of_the_image():
    """Times of up to 1,000 make waves of the time whose derivative drowns what is learned."""
    net = randomised(DiT(DenoiserDims(sample=1, times=2), 2, 32, 2, 2))
    z, times = torch.randn(4, 1, 4, 4), torch.tensor([[900.0, 300], [500, 100], [100, 20], [999, 900]])
    still, model = torch.zeros_like(z), lambda x, t: net(x, t, Cond())
    sizes = [
        MeanFlow(improved=False, time_scale=scale)._slope(model, z, times, still).abs().mean().item()
        for scale in (1.0, 1000.0)
    ]
    with sdpa_kernel(SDPBackend.MATH):
        along_z = jvp(lambda z: model(z, times / T), (z,), (torch.randn_like(z),))[1].abs().mean().item()
    assert sizes[0] < 2 * along_z and sizes[1] > 20 * sizes[0]


def test_validation_measures_the_velocity():
    objective = MeanFlow()
    x0, noise = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    t = torch.tensor([900.0, 500, 100, 20])
    expected = (average(*at(x0, noise, t)) - (noise - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(objective.loss(average, x0, noise, torch.stack([t, t], 1)), expected)


def at(x0, noise, t):
    sigma = ((t + 1) / T).view(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise, torch.stack([t / T, torch.zeros_like(t)], 1)
