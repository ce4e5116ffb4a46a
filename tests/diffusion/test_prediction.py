import pytest
import torch

from ldm.diffusion.prediction import EDM, X0, Epsilon, Flow, Velocity, noise_of
from ldm.diffusion.schedule import Linear, RectifiedFlow, ScaledLinear, ZeroTerminalSNR

PREDICTIONS = [Epsilon(), Velocity(), X0(), Flow(), EDM(), EDM(1.0)]


@pytest.fixture(params=[Linear(), ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()])
def noisy(request):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 1, 250, 500, 900, 997])
    alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in (request.param.alpha, request.param.sigma))
    return x0, noise, alpha * x0 + sigma * noise, alpha, sigma


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_leads_back_to_x0_and_noise(prediction, noisy):
    x0, noise, x_t, alpha, sigma = noisy
    found = prediction.x0(prediction.target(x0, noise, alpha, sigma), x_t, alpha, sigma)
    assert torch.allclose(found, x0, atol=1e-10)
    assert torch.allclose(noise_of(found, x_t, alpha, sigma), noise, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_error_ratio_is_the_ratio_of_the_errors(prediction, noisy):
    x0, noise, x_t, alpha, sigma = noisy
    error = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output = prediction.target(x0, noise, alpha, sigma) + error
    of_x0 = (prediction.x0(output, x_t, alpha, sigma) - x0).square().sum((1, 2, 3))
    ratio = prediction.error_ratio(alpha, sigma).flatten()
    assert torch.allclose(error.square().sum((1, 2, 3)), ratio * of_x0, rtol=1e-6)


def test_velocity_is_the_derivative_along_the_circle(noisy):
    """With alpha = cos(phi), sigma = sin(phi): v = d x_t / d phi (Salimans & Ho 2022, app. D)."""
    x0, noise, _, alpha, sigma = noisy
    alpha, sigma = (part / torch.hypot(alpha, sigma) for part in (alpha, sigma))  # onto the circle
    phi, h = torch.atan2(sigma, alpha), 1e-6

    def at(angle):
        return angle.cos() * x0 + angle.sin() * noise

    slope = (at(phi + h) - at(phi - h)) / (2 * h)
    assert torch.allclose(Velocity().target(x0, noise, alpha, sigma), slope, atol=1e-8)


@pytest.mark.parametrize("prediction", [Velocity(), X0(), Flow()])
def test_all_but_epsilon_are_sound_without_signal(prediction):
    x0, noise = torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    zero, one = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    found = prediction.x0(prediction.target(x0, noise, zero, one), noise, zero, one)
    assert torch.allclose(found, x0, atol=1e-6)


def test_flow_is_the_derivative_along_the_line():
    x0, noise, s, h = torch.randn(1, 3).double(), torch.randn(1, 3).double(), 0.3, 1e-6

    def at(sigma):
        return (1 - sigma) * x0 + sigma * noise

    slope = (at(s + h) - at(s - h)) / (2 * h)
    assert torch.allclose(Flow().target(x0, noise, torch.tensor(1 - s), torch.tensor(s)), slope, atol=1e-8)
