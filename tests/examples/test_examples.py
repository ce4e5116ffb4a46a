"""The examples say what is true: the toy's score, what its network learns, and digits that are digits."""

import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from examples import ddpm_digits, toy_2d


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_score_is_the_gradient_of_the_log_density():
    for alpha, sigma in ((1.0, 0.05), (0.8, 0.6), (0.1, 0.995), (0.0, 1.0)):
        variance = (alpha * toy_2d.STD) ** 2 + sigma**2
        parts = Independent(Normal(alpha * toy_2d.MEANS, variance**0.5), 1)
        x = torch.randn(100, 2).requires_grad_()
        density = MixtureSameFamily(Categorical(torch.ones(8)), parts)
        (expected,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        levels = (torch.full((100, 1), value) for value in (alpha, sigma))
        assert torch.allclose(toy_2d.score(x.detach(), *levels), expected, rtol=1e-3, atol=1e-3)


def test_the_best_estimate_is_the_one_that_no_other_comes_closer_than():
    """E[x0 | x_t] by Tweedie leaves an error that is uncorrelated with any function of x_t."""
    t = torch.full((len(toy_2d.DATA),), 500)
    alpha, sigma = toy_2d.OBJECTIVE.schedule.at(t, toy_2d.DATA)
    x_t = alpha * toy_2d.DATA + sigma * torch.randn_like(toy_2d.DATA)
    error = toy_2d.DATA - (x_t + sigma**2 * toy_2d.score(x_t, alpha, sigma)) / alpha
    for function in (x_t, x_t.sin(), x_t.square()):
        product = error * (function - function.mean(0))
        assert (product.mean(0).abs() < 5 * product.std(0) / len(t) ** 0.5).all()


@pytest.mark.slow
def test_the_toy_learns_what_is_known():
    """A tenth of the steps, and two and a half times the distance that the example promises."""
    learned, untrained = toy_2d.train(400), toy_2d.train(0)
    for level in (0.5, 1.0, 2.0):
        assert toy_2d.distance(learned, level) < 0.15 < 0.3 < toy_2d.distance(untrained, level)


@pytest.mark.slow
def test_digits_become_digits(tmp_path):
    """A twentieth of the steps leads most of the way from noise, at 3.7, to digits, and copies none."""
    ratio = ddpm_digits.main(50, str(tmp_path / "digits.png"))
    assert 1.0 < ratio < 2.5
    assert Image.open(tmp_path / "digits.png").size == (600, 600)
