"""Flow objectives: contrastive flow matching, x-prediction with velocity loss, shift by resolution."""

import math

import pytest
import torch

from ldm.diffusion.contrastive_flow import ContrastiveFlow
from ldm.diffusion.directed_flow import DirectedFlow
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import X0, Flow
from ldm.diffusion.resolution_flow import ResolutionFlow
from ldm.diffusion.schedule import RectifiedFlow
from ldm.diffusion.timesteps import LogitNormal
from ldm.diffusion.weighting import FlowError


def test_the_contrastive_optimum_is_pushed_away_from_the_mean_of_all_targets():
    """d/dv of E|v - m|**2 - w E|v - m'|**2 is 0 at v = (m - w m') / (1 - w)."""
    objective = ContrastiveFlow(weight=0.2)
    x0, noise = torch.randn(64, 1, 2, 2).double() + 3, torch.randn(64, 1, 2, 2).double()
    t = torch.full((64,), 400)
    target = noise - x0
    v = torch.zeros(1, 1, 2, 2, requires_grad=True)
    objective.training_loss(lambda x, t: v.expand(64, -1, -1, -1), x0, noise, t).sum().backward()
    with_negatives = v.grad.clone()
    mean = target.mean(0, keepdim=True).float()
    torch.testing.assert_close(with_negatives, (-2 * 64 * (1 - 0.2) * mean) / 4, rtol=1e-4, atol=1e-4)
    output = torch.randn(64, 1, 2, 2)
    got = objective.training_loss(lambda x, t: output, x0, noise, t)
    other = (output - target.roll(1, 0)).square().flatten(1).mean(1)
    expected = (output - target).square().flatten(1).mean(1) - 0.2 * other
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_without_negatives_it_is_flow_matching_and_so_is_its_validation():
    x0, noise, t = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2), torch.arange(5) * 200
    model = lambda x, t: 0.3 * x  # noqa: E731
    plain = Objective(RectifiedFlow(), Flow()).loss(model, x0, noise, t)
    assert torch.equal(ContrastiveFlow(weight=0.0).training_loss(model, x0, noise, t), plain)
    assert torch.equal(ContrastiveFlow().loss(model, x0, noise, t), plain)
    assert not torch.equal(ContrastiveFlow().training_loss(model, x0, noise, t), plain)
    with pytest.raises(ValueError, match=r"objective\.weight must be in \[0, 1\), got 1"):
        ContrastiveFlow(weight=1.0)


def test_the_direction_of_the_velocity_is_learned_beside_its_error():
    x0, noise, t = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2), torch.arange(5) * 200
    plain, target = Objective(RectifiedFlow(), Flow()), noise - x0
    objective = DirectedFlow(weight=2.0)
    for scale in (1.0, 3.0):  # the direction is right, whatever the length
        model = lambda x, t, scale=scale: scale * target  # noqa: E731
        torch.testing.assert_close(
            objective.training_loss(model, x0, noise, t),
            plain.loss(model, x0, noise, t),
            atol=1e-5,
            rtol=1e-5,
        )
    for part, away in ((-target, 2.0), (torch.cross(target, x0, dim=1), 1.0)):
        added = objective.training_loss(lambda x, t, part=part: part, x0, noise, t) - plain.loss(
            lambda x, t, part=part: part, x0, noise, t
        )
        torch.testing.assert_close(added, torch.full((5,), 2.0 * away), atol=1e-4, rtol=1e-4)
    guess = lambda x, t: 0.3 * x  # noqa: E731
    assert torch.equal(objective.loss(guess, x0, noise, t), plain.loss(guess, x0, noise, t))
    with pytest.raises(ValueError, match=r"objective\.weight must be at least 0, got -1"):
        DirectedFlow(weight=-1.0)


def test_x_prediction_with_velocity_loss_is_the_error_of_the_velocity():
    x0, noise, t = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.tensor([80, 300, 600, 999])
    schedule = RectifiedFlow()
    sigma = ((t + 1) / 1000).view(-1, 1, 1, 1)
    x_t = schedule.add_noise(x0, noise, t)
    guess = torch.randn_like(x0)
    got = Objective(schedule, X0(), FlowError()).loss(lambda x, t: guess, x0, noise, t)
    velocity = (x_t - guess) / sigma
    torch.testing.assert_close(got, (velocity - (noise - x0)).square().flatten(1).mean(1), rtol=1e-4, atol=0)
    floored = FlowError(0.05)(schedule, X0())
    assert floored[0] == pytest.approx(floored[40]) == pytest.approx(400) and floored[999] == pytest.approx(1)
    torch.testing.assert_close(FlowError(1e-9)(schedule, Flow()), torch.ones(1000).double())


def test_the_shift_by_resolution_is_equation_23():
    shifted, base = ResolutionFlow(128, 64), ResolutionFlow(64, 64)
    assert torch.equal(base.sigma, RectifiedFlow().sigma)
    ratio = math.sqrt(128**2 / 64**2)
    expected = ratio * base.sigma / (1 + (ratio - 1) * base.sigma)
    torch.testing.assert_close(shifted.sigma, expected)
    # the noise level, over the root of the number of pixels, is the same
    torch.testing.assert_close(shifted.noise_level[:-1] / 128, base.noise_level[:-1] / 64)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (0.5, 0.6)])
def test_logit_normal_times_have_the_quantiles_of_the_law(mean, std):
    uniform = torch.tensor([0.1, 0.5, 0.9]).double()
    t = LogitNormal(mean, std).quantile(uniform, RectifiedFlow(100_000))
    normal = torch.distributions.Normal(mean, std).icdf(uniform)
    torch.testing.assert_close(t.double() / 100_000, normal.sigmoid(), rtol=1e-4, atol=0)
