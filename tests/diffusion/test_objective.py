import pytest
import torch
from torch import nn

from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import EDM, X0, Epsilon, Flow, Velocity
from ldm.diffusion.schedule import Cosine, Linear, RectifiedFlow, ScaledLinear, ZeroTerminalSNR
from ldm.diffusion.weighting import MinSNR, Simple, SoftMinSNR, Uniform, VariationalBound
from ldm.rng import SampleNoise

PREDICTIONS = [Epsilon(), Velocity(), X0(), Flow(), EDM()]


def drawn(objective, count=6, seed=0):
    x0 = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    t, noise = objective.draw(x0, SampleNoise(seed, [str(i) for i in range(count)]))
    return x0, noise, t


def test_draw_is_uniform_over_all_timesteps():
    objective, count = Objective(Linear(10, 1e-3, 0.5)), 20_000
    for noise in (None, SampleNoise(0, [str(i) for i in range(count)])):
        t, eps = objective.draw(torch.zeros(count, 2), noise)
        counts = torch.bincount(t, minlength=10)
        assert len(counts) == 10  # 0 and T - 1 included, T not
        assert ((counts - count / 10).abs() < 5 * (count * 0.1 * 0.9) ** 0.5).all()
        assert (eps.var() - 1).abs() < 5 * (1 / count) ** 0.5


def test_the_largest_uniform_number_stays_below_T():
    class Largest(SampleNoise):
        def uniform(self):
            return torch.full((1,), 1 - 2**-24)

    for num_steps in (10, 1000, 4000):
        t, _ = Objective(Linear(num_steps)).draw(torch.zeros(1, 2), Largest(0, ["a"]))
        assert t.item() == num_steps - 1


def test_draw_is_a_function_of_seed_and_key():
    objective, x0 = Objective(), torch.zeros(4, 3)
    t, noise = objective.draw(x0, SampleNoise(1, list("abcd")))
    t_of_c, noise_of_c = objective.draw(x0[:1], SampleNoise(1, ["c"]))
    assert torch.equal(t[2:3], t_of_c) and torch.equal(noise[2:3], noise_of_c)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_knows_has_no_loss_and_denoises(prediction):
    objective = Objective(Cosine(), prediction)
    x0, noise, t = drawn(objective)
    alpha, sigma = objective.schedule.at(t, x0)
    truth = prediction.target(x0, noise, alpha, sigma)
    assert torch.equal(objective.loss(lambda x, t: truth, x0, noise, t), torch.zeros(6))
    x_t = objective.schedule.add_noise(x0, noise, t)
    # Rounding of x_t, 6e-8, divided by alpha.
    limit = 1e-6 / alpha.min().item() if isinstance(prediction, Epsilon) else 1e-6
    assert torch.allclose(objective.denoiser(lambda x, t: truth)(x_t, t), x0, atol=limit)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", [None, MinSNR()])
def test_gradient_is_that_of_the_formula(prediction, weighting):
    """d/d output of w mean((output - target)**2) = 2 w (output - target) / (C h w)."""
    objective = Objective(Linear(), prediction, weighting)
    x0, noise, t = drawn(objective)
    alpha, sigma = objective.schedule.at(t, x0)
    output = torch.randn_like(x0).requires_grad_()
    objective.loss(lambda x, t: output, x0, noise, t).sum().backward()
    weight = objective.weighting(objective.schedule, prediction)[t].float().view(-1, 1, 1, 1)
    expected = 2 * weight * (output.detach() - prediction.target(x0, noise, alpha, sigma)) / x0[0].numel()
    assert torch.allclose(output.grad, expected, rtol=1e-5, atol=1e-8)


def test_loss_is_per_sample_and_float32_under_bfloat16():
    objective = Objective()
    x0, noise, t = drawn(objective)
    model = nn.Conv2d(3, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(lambda x, t: model(x), x0, noise, t)
        alone = objective.loss(lambda x, t: model(x), x0[2:3], noise[2:3], t[2:3])
    assert loss.shape == (6,) and loss.dtype == torch.float32
    assert torch.allclose(loss[2:3], alone)
    assert objective.loss(lambda x, t: x, x0.bfloat16(), noise.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_regression_finds_the_analytic_denoiser(prediction, gaussian):
    """The minimiser of the loss at one t is the posterior mean: fit an affine map to Gaussian data."""
    data, objective, count, t = gaussian, Objective(Linear(), prediction), 100_000, 300
    generator = torch.Generator().manual_seed(0)
    x0 = data.mean + data.std * torch.randn(count, 1, 1, 1, generator=generator)
    noise, times = torch.randn(count, 1, 1, 1, generator=generator), torch.full((count,), t)
    alpha, sigma = objective.schedule.at(times, x0)
    x_t = objective.schedule.add_noise(x0, noise, times)
    given = prediction.input(x_t, alpha, sigma)
    design = torch.stack([given.flatten(), torch.ones(count)], 1)
    slope, offset = torch.linalg.lstsq(
        design, prediction.target(x0, noise, alpha, sigma).view(-1, 1)
    ).solution
    x = torch.linspace(-2, 2, 9).view(-1, 1, 1, 1)
    times = times[:9]
    found = objective.denoiser(lambda x, t: slope * x + offset)(x, times)
    # The residual's std is below the data's, and at |x| <= 2 the fit is good to a few std / sqrt(count).
    assert torch.allclose(found, data.denoiser(objective.schedule)(x, times), atol=10 * data.std / count**0.5)


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()])
@pytest.mark.parametrize("prediction", [Velocity(), X0(), Flow()])
@pytest.mark.parametrize("weighting", [Uniform(), Simple(), MinSNR(), SoftMinSNR(), VariationalBound()])
def test_loss_and_gradient_are_finite_without_signal(schedule, prediction, weighting):
    objective = Objective(schedule, prediction, weighting)
    x0, noise, _ = drawn(objective)
    t = torch.tensor([0, 1, 500, 997, 998, 999])
    output = torch.randn_like(x0).requires_grad_()
    loss = objective.loss(lambda x, t: output, x0, noise, t)
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad.isfinite().all()
    assert objective.denoiser(lambda x, t: output)(noise, t).isfinite().all()


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()])
@pytest.mark.parametrize("prediction", [Epsilon(), EDM()])
def test_the_noise_is_not_predicted_where_there_is_nothing_else(schedule, prediction):
    message = rf"objective\.prediction: got {type(prediction).__name__} on .*expected Velocity, Flow or X0"
    with pytest.raises(ValueError, match=message):
        Objective(schedule, prediction)


def test_between_timesteps_the_weight_is_linear():
    objective = Objective(Linear(), weighting=MinSNR())
    expected = objective.weight(torch.tensor([300, 301, 999]))
    assert torch.equal(objective.weight(torch.tensor([300.0, 301.0, 999.0])), expected)
    between = objective.weight(torch.tensor([300.25])).item()
    assert between == pytest.approx(0.75 * expected[0].item() + 0.25 * expected[1].item(), rel=1e-6)


def test_offset_noise_is_constant_in_a_channel_and_included_in_the_target():
    objective, x0 = Objective(offset_noise=0.5), torch.zeros(2000, 2, 4, 4)
    keys = [str(i) for i in range(2000)]
    _, eps = objective.draw(x0, SampleNoise(0, keys))
    plain = Objective().draw(x0, SampleNoise(0, keys))[1]
    offset = eps - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert offset[..., 0, 0].std().item() == pytest.approx(0.5, rel=5 / (2 * 4000) ** 0.5)
    assert abs((offset[:, 0, 0, 0] * offset[:, 1, 0, 0]).mean().item()) < 5 * 0.25 / 2000**0.5
