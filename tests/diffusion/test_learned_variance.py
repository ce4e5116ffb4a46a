"""Improved DDPM: the bound is the divergence of two normal laws, and trains the variance alone."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.guidance import ClassifierFree, extrapolated
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import X0, Epsilon
from ldm.diffusion.samplers.ddpm import DDPM, posterior
from ldm.diffusion.schedule import Cosine, Linear
from ldm.diffusion.timesteps import LogNormal


def samples(count=6):
    return torch.randn(count, 3, 4, 4), torch.randn(count, 3, 4, 4)


@pytest.mark.parametrize("schedule", [Linear(50, 1e-3, 0.2), Cosine(50)], ids=["linear", "cosine"])
def test_the_bound_is_the_divergence_from_the_posterior(schedule):
    objective = LearnedVariance(schedule)
    x0, x0_hat = samples()
    v = torch.rand_like(x0) * 2 - 1
    t = torch.tensor([0, 1, 2, 10, 30, 48])
    steps = {step.t: step for step in DDPM().steps(schedule)}
    got = objective.bits(x0, x0_hat, v, t)
    for i, step in enumerate(steps[each] for each in t.tolist()):
        from_x0, _, std = posterior(step)
        ratio = step.alpha / step.next_alpha
        beta = step.sigma**2 - (ratio * step.next_sigma) ** 2
        smallest = posterior(steps[1])[2] if step.t == 0 else std
        learned = torch.exp((v[i] + 1) / 4 * math.log(beta) + (1 - v[i]) / 4 * math.log(smallest**2))
        theirs = Normal(from_x0 * x0_hat[i], learned)
        if step.t == 0:
            expected = -theirs.log_prob(from_x0 * x0[i])
        else:
            expected = kl_divergence(Normal(from_x0 * x0[i], std), theirs)
        assert got[i].item() == pytest.approx(expected.mean().item() / math.log(2), rel=1e-4)


def test_the_divergence_is_the_integral_that_defines_it():
    objective = LearnedVariance(Linear(50, 1e-3, 0.2))
    x0, x0_hat, v = torch.tensor([0.3, -0.1, 0.4]).double()
    t = torch.tensor([20])
    lower, upper, factor = objective._tables[:, 20]
    learned = ((lower + (upper - lower) * (v + 1) / 2) / 2).exp()
    q = Normal(factor * x0, (lower / 2).exp())
    p = Normal(factor * x0_hat, learned)
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64) * q.scale + q.loc
    integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid))
    found = torch.trapezoid(integrand, grid) / math.log(2)
    got = objective.bits(*(each.view(1, 1, 1, 1) for each in (x0, x0_hat, v)), t)
    assert got.item() == pytest.approx(found.item(), rel=1e-8)


def test_the_bound_trains_the_variance_alone_and_the_error_the_mean_alone():
    schedule, (x0, noise) = Linear(50, 1e-3, 0.2), samples()
    t = torch.tensor([0, 1, 7, 20, 33, 49])
    plain, hybrid = Objective(schedule, Epsilon()), LearnedVariance(schedule, bound=0.3)
    eps, v = torch.randn_like(x0).requires_grad_(), torch.zeros_like(x0).requires_grad_()
    hybrid.loss(lambda x, t: torch.cat([eps, v], 1), x0, noise, t).sum().backward()
    found, of_v = eps.grad.clone(), v.grad
    eps.grad = None
    plain.loss(lambda x, t: eps, x0, noise, t).sum().backward()
    torch.testing.assert_close(found, eps.grad)
    assert of_v.flatten(1).any(1).all()


def test_the_best_variance_is_the_mean_squared_error_of_the_mean():
    """Over v, the bound is least at beta-tilde + E (error of the mean)**2."""
    schedule = Linear(50, 1e-3, 0.2)
    objective, t = LearnedVariance(schedule), torch.full((4000,), 30)
    x0 = 0.4 * torch.randn(4000, 1, 1, 1).double()
    v = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective.bits(x0, torch.zeros_like(x0), v.expand_as(x0), t).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    lower, upper, factor = objective._tables[:, 30]
    learned = (lower + (upper - lower) * (v.detach() + 1) / 2).exp()
    assert learned.item() == pytest.approx((lower.exp() + (factor * x0).square().mean()).item(), rel=1e-5)


def test_sampling_uses_the_learned_variance_between_its_bounds():
    schedule = Linear(20, 1e-3, 0.4)
    steps = DDPM(5).steps(schedule)[3:4]
    x = torch.randn(20_000, 1, 1, 1)

    def spread(v):
        estimate = lambda x, t: torch.cat([torch.zeros_like(x), torch.full_like(x, v)], 1)  # noqa: E731
        drawn = DDPM()(estimate, steps, x, torch.randn_like) - DDPM()(estimate, steps, x, torch.zeros_like)
        return drawn.std().item()

    step = steps[0]
    _, _, std = posterior(step)
    widest = math.sqrt(step.sigma**2 - (step.alpha / step.next_alpha * step.next_sigma) ** 2)
    assert widest > 1.05 * std
    for v, expected in ((-1, std), (-7, std), (1, widest), (0, math.sqrt(widest * std))):
        assert spread(v) == pytest.approx(expected, rel=0.02)
    plain = lambda x, t: torch.zeros_like(x)  # noqa: E731
    kept = torch.randn_like(x)
    estimate = lambda x, t: torch.cat([torch.zeros_like(x), torch.full_like(x, -1.0)], 1)  # noqa: E731
    assert torch.equal(DDPM()(plain, steps, x, lambda _: kept), DDPM()(estimate, steps, x, lambda _: kept))


def test_guidance_leaves_the_variance_of_the_condition():
    x_t, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)

    class Model:
        def cond_and_uncond(self, batch):
            return lambda x, t: (torch.full((2, 2, 2, 2), 3.0), torch.full((2, 2, 2, 2), 1.0))

    got = ClassifierFree(2.0)(Model(), {})(x_t, t)
    assert got[:, 0].unique().tolist() == [5.0] and got[:, 1].unique().tolist() == [3.0]
    weak, strong = (lambda x, t: torch.ones(2, 1, 2, 2)), (lambda x, t: torch.full((2, 2, 2, 2), 3.0))
    got = extrapolated(weak, strong, 2.0)(x_t, t)
    assert got[:, 0].unique().tolist() == [5.0] and got[:, 1].unique().tolist() == [3.0]


def test_the_estimate_is_that_of_the_first_channels():
    schedule, (x_t, output) = Linear(50, 1e-3, 0.2), samples()
    t, model = torch.arange(6), lambda x, t: torch.cat([output, x], 1)
    plain = Objective(schedule, X0()).denoiser(lambda x, t: output)(x_t, t)
    objective = LearnedVariance(schedule, X0())
    assert torch.equal(objective.denoiser(model)(x_t, t), plain)
    assert torch.equal(objective.variance_denoiser(model)(x_t, t), torch.cat([plain, x_t], 1))


def test_fractional_timesteps_are_refused():
    objective = LearnedVariance(timesteps=LogNormal())
    with pytest.raises(ValueError, match="needs whole timesteps, but LogNormal draws fractional ones"):
        objective.loss(lambda x, t: torch.cat([x, x], 1), *samples(), torch.rand(6))
