"""EDM: preconditioning, noise levels and weight of Karras et al. 2022 (arXiv:2206.00364)."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from trajectories import DETERMINISTIC, RANDOM, OneByOne, never, run

from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import EDM, X0, Velocity
from ldm.diffusion.samplers.dpm_solver import DPMSolver
from ldm.diffusion.samplers.euler import Euler
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.spacing import Karras, Trailing
from ldm.diffusion.schedule import Cosine, Linear, ScaledLinear
from ldm.diffusion.timesteps import LogNormal
from ldm.diffusion.variance_exploding import VarianceExploding
from ldm.diffusion.weighting import EDMWeighting, Uniform
from ldm.rng import SampleNoise

LEVELS = torch.logspace(-3, 3, 25, dtype=torch.float64)
SCHEDULES = [VarianceExploding(), ScaledLinear(), Cosine()]
every_sigma_data = pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])


def network(x, time):
    """No denoiser of anything, but smooth, bounded and different at each noise level."""
    return (1.3 * x + time.view(-1, 1, 1, 1)).sin()


@every_sigma_data
def test_input_and_target_have_unit_variance_and_c_out_is_minimal(sigma_data):
    """App. B.6: for independent y and n of standard deviations sigma_data and s."""
    edm = EDM(sigma_data)

    def c_out(c_skip):
        """The factor that gives (y - c_skip (y + n)) / c_out unit variance."""
        return ((1 - c_skip).square() * sigma_data**2 + c_skip.square() * LEVELS.square()).sqrt()

    of_input = edm.c_in(LEVELS).square() * (sigma_data**2 + LEVELS.square())
    assert torch.allclose(of_input, torch.ones_like(LEVELS), rtol=1e-12)
    skip = edm.c_skip(LEVELS)
    assert torch.allclose(c_out(skip), edm.c_out(LEVELS), rtol=1e-12)
    for step in (-0.1, -1e-3, 1e-3, 0.1):
        assert (c_out(skip + step) > edm.c_out(LEVELS)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@every_sigma_data
def test_the_network_meets_unit_variance(schedule, sigma_data):
    """Through the objective: 200,000 numbers at each level, the variance of a variance being 2 / n."""
    objective, met = Objective(schedule, EDM(sigma_data)), []
    t = torch.tensor([0.0, 250.5, 500.0, 750.25, 999.0])
    x0, noise = sigma_data * torch.randn(5, 200_000), torch.randn(5, 200_000)
    objective.loss(lambda x, time: met.append(x) or x, x0, noise, t)
    target = objective.prediction.target(x0, noise, *schedule.at(t, x0))
    for seen in (met[0], target):
        assert (seen.var(1) - 1).abs().max() < 5 * (2 / 200_000) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES)
@every_sigma_data
def test_the_loss_is_that_of_the_paper(schedule, sigma_data):
    """lambda(sigma) ||D(y + n; sigma) - y||**2, with D and lambda written from Eq. 7 and Table 1."""
    y, keys = torch.randn(64, 3, 4, 4), [str(i) for i in range(64)]
    objective = Objective(schedule, EDM(sigma_data), timesteps=LogNormal())
    t, eps = objective.draw(y, SampleNoise(0, keys), torch.arange(64))
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in schedule.levels(t.double()))
    s, noisy = sigma / alpha, y + sigma / alpha * eps
    raw = network((noisy / (s**2 + sigma_data**2).sqrt()).float(), (s.log() / 4).float())
    denoised = sigma_data**2 / (s**2 + sigma_data**2) * noisy
    denoised = denoised + s * sigma_data / (s**2 + sigma_data**2).sqrt() * raw
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    expected = (weight * (denoised - y) ** 2).mean((1, 2, 3))
    for weighting in (Uniform(), EDMWeighting(sigma_data)):
        objective.weighting = weighting
        assert torch.allclose(objective.loss(network, y, eps, t).double(), expected, rtol=1e-3)
    x_t = objective.schedule.add_noise(y, eps, t)
    assert torch.allclose(objective.denoiser(network)(x_t, t).double(), denoised, rtol=1e-3, atol=1e-4)


@every_sigma_data
def test_the_weight_is_the_same_on_another_prediction(sigma_data):
    schedule = VarianceExploding()
    t = torch.tensor([0.0, 123.4, 600.5, 999.0])
    s = schedule.levels(t.double())[1]
    expected = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    found = Objective(schedule, X0(), EDMWeighting(sigma_data)).weight(t).double()
    assert torch.allclose(found, expected, rtol=1e-4)  # linear between timesteps 1 % apart


@pytest.mark.parametrize("schedule", [Linear(), ScaledLinear(), Cosine()])
def test_with_unit_data_on_preserved_variance_it_is_velocity_backwards(schedule):
    x0, noise = torch.randn(2, 1000, 3, dtype=torch.float64)
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    x_t = alpha * x0 + sigma * noise
    assert torch.allclose(EDM(1.0).input(x_t, alpha, sigma), x_t, rtol=1e-9)
    v = Velocity().target(x0, noise, alpha, sigma)
    assert torch.allclose(EDM(1.0).target(x0, noise, alpha, sigma), -v, atol=1e-9)
    found = EDM(1.0).x0(-network(x_t, v[:, 0]), x_t, alpha, sigma)
    assert torch.allclose(found, Velocity().x0(network(x_t, v[:, 0]), x_t, alpha, sigma), atol=1e-9)


def test_impossible_deviations_are_refused():
    with pytest.raises(ValueError, match=r"objective\.prediction\.sigma_data must be > 0, got 0"):
        EDM(0)


# The ideal network, a function of c_in x and c_noise, for data N(mean, std**2).


def ideal(data, prediction):
    """F = (D - c_skip x) / c_out for the posterior mean D = mean + std**2 / (std**2 + s**2) (x - mean)."""

    def model(scaled, time):
        s = (4 * time.double()).exp().view(-1, 1, 1, 1)
        x = scaled.double() / prediction.c_in(s)
        best = data.mean + data.std**2 / (data.std**2 + s**2) * (x - data.mean)
        return (best - prediction.c_skip(s) * x) / prediction.c_out(s)

    return model


def affine(sampler, data, steps, schedule, prediction):
    """Mean of what a deterministic sampler makes of noise, and its slope in standard normal noise."""
    denoise = Objective(schedule, prediction).denoiser(ideal(data, prediction))
    x = steps[0].start_std * torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)
    low, high = sampler(denoise, steps, x, never).flatten().tolist()
    return low, high - low


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [(Euler, 1), (Heun, 2)])
@every_sigma_data
def test_the_trajectory_of_an_ideal_network_is_the_product_of_its_steps(
    schedule, sampler, order, sigma_data, gaussian
):
    """d(x - mean) / ds = a(s) (x - mean), a = s / (std**2 + s**2): the methods multiply by 1 + h a and by
    1 + h (a + a' (1 + h a)) / 2.
    """
    sampler = sampler(20, Karras())
    steps, factor = sampler.steps(schedule), 1.0
    for step in steps:
        s, following = step.noise_level, step.next_noise_level
        a, after = (level / (gaussian.std**2 + level**2) for level in (s, following))
        euler = 1 + (following - s) * a
        middle = order == 2 and following > 0 and not step.from_noise
        factor *= 1 + (following - s) * (a + after * euler) / 2 if middle else euler
    start = steps[0].start_std / steps[0].alpha
    mean, slope = affine(sampler, gaussian, steps, schedule, EDM(sigma_data))
    assert slope == pytest.approx(factor * start, rel=2e-4)
    assert mean == pytest.approx(gaussian.mean * (1 - factor), abs=2e-4)


@pytest.mark.parametrize("spacing", [Karras(), Trailing()])
@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *RANDOM])
def test_every_sampler_draws_the_data_where_variance_explodes(sampler, spacing, gaussian):
    """Mean and standard deviation of the samples, exactly: they are affine in x_T and in each draw."""
    schedule, sampler = VarianceExploding(), sampler(300)
    sampler.spacing = Trailing() if isinstance(sampler, PLMS) else spacing
    steps = sampler.steps(schedule)
    x = torch.zeros(len(steps) + 2, 1, 1, 1)
    x[1] = steps[0].start_std
    denoise = Objective(schedule, EDM()).denoiser(ideal(gaussian, EDM()))
    x0 = run(sampler, denoise, schedule, x, OneByOne()).flatten().double()
    lost = gaussian.mean * gaussian.std / 80  # noise to start with knows nothing of the mean
    assert x0[0].item() == pytest.approx(gaussian.mean, abs=lost + 1e-3)
    assert (x0[1:] - x0[0]).norm().item() == pytest.approx(gaussian.std, rel=0.03)


def test_heun_converges_at_second_order_on_the_schedule_of_edm(gaussian):
    """To the exact flow, which keeps (x - mean) / sqrt(std**2 + s**2), as far as sigma_min."""
    schedule = VarianceExploding()
    first, last = (math.hypot(gaussian.std, schedule.sigma[i].item()) for i in (-1, 0))
    errors = []
    for count in (16, 32, 64):
        sampler = Heun(count, Karras())
        steps = sampler.steps(schedule)[:-1]
        _, slope = affine(sampler, gaussian, steps, schedule, EDM())
        errors.append(abs(slope / (80.0 * last / first) - 1))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates == pytest.approx([2, 2], abs=0.25)


# The same by diffusers, which has EDM as schedulers.

THEIRS = [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler]


@pytest.mark.parametrize("scheduler", THEIRS)
@every_sigma_data
def test_preconditioning_agrees_with_diffusers(scheduler, sigma_data):
    theirs, ours = scheduler(sigma_data=sigma_data), EDM(sigma_data)
    x, output = torch.randn(2, 25, 3, dtype=torch.float64)
    sigma = LEVELS[:, None]
    alpha = torch.ones_like(sigma)
    assert torch.allclose(ours.input(x, alpha, sigma), theirs.precondition_inputs(x, sigma), rtol=1e-12)
    assert torch.allclose(ours.time(sigma, alpha, sigma), theirs.precondition_noise(LEVELS), rtol=1e-12)
    expected = theirs.precondition_outputs(x, output, sigma)
    assert torch.allclose(ours.x0(output, x, alpha, sigma), expected, rtol=1e-12)


@pytest.mark.parametrize(("scheduler", "sampler"), [(THEIRS[0], Euler), (THEIRS[1], DPMSolver)])
def test_levels_and_trajectories_agree_with_diffusers(scheduler, sampler):
    settings = {} if sampler is Euler else {"euler_at_final": True}
    theirs, schedule, sampler = scheduler(**settings), VarianceExploding(), sampler(20, Karras())
    theirs.set_timesteps(20)
    steps = sampler.steps(schedule)
    assert [step.noise_level for step in steps] == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-5)
    x = start = torch.randn(2, 3, 4, 4)
    x = x * theirs.sigmas[0]
    for t in theirs.timesteps:
        x = theirs.step(network(theirs.scale_model_input(x, t), t.repeat(2)), t, x).prev_sample
    denoise = Objective(schedule, EDM()).denoiser(network)
    assert torch.allclose(sampler(denoise, steps, steps[0].start_std * start, never), x, atol=2e-4)
