"""Samplers on Gaussian data, whose denoiser, flow and laws are known exactly."""

import math
from itertools import pairwise

import pytest
import torch
from trajectories import DETERMINISTIC, HIGHER_ORDER, RANDOM, SCHEDULES, WITHOUT_SIGNAL, law, never, run

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM, posterior
from ldm.diffusion.samplers.dpm_solver import DPMSolver
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.spacing import Trailing, trajectory
from ldm.diffusion.samplers.unipc import UniPC
from ldm.diffusion.schedule import Linear, RectifiedFlow, ZeroTerminalSNR

every_schedule = pytest.mark.parametrize("schedule", [*SCHEDULES, *WITHOUT_SIGNAL])


def points(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


def affine(sampler, data, schedule):
    """The map x_T -> x0 of a deterministic sampler on Gaussian data is affine: return offset and slope."""
    x = run(sampler, data.denoiser(schedule), schedule, points(0.0, 1.0), never).flatten()
    return x[0].item(), (x[1] - x[0]).item()


def flow(data, schedule):
    """Offset and slope of the exact probability flow from T - 1 to 0, followed by x0_hat.

    It keeps (x_t - alpha mean) / std_t, where std_t**2 = alpha**2 std**2 + sigma**2.
    """
    first, last = ((schedule.alpha[i].item(), schedule.sigma[i].item()) for i in (-1, 0))
    std_first, std_last = (math.hypot(alpha * data.std, sigma) for alpha, sigma in (first, last))
    slope = data.std**2 * last[0] / std_last / std_first
    return data.mean * (1 - slope * first[0]), slope


def moments(sampler_std, schedule, data, num_steps):
    """Mean and variance of what Eq. 12 of Song et al. 2020 makes of N(0, 1), by its linear recursion."""
    mean, variance = 0.0, 1.0
    for step in trajectory(schedule, Trailing(), num_steps):
        std = sampler_std(step)
        direction = math.sqrt(step.next_sigma**2 - std**2) / step.sigma
        gain = data.std**2 * step.alpha / (step.alpha**2 * data.std**2 + step.sigma**2)
        slope = direction + (step.next_alpha - direction * step.alpha) * gain
        offset = (step.next_alpha - direction * step.alpha) * data.mean * (1 - gain * step.alpha)
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, variance


@every_schedule
def test_ancestral_sampling_ends_at_mean_and_variance_of_the_data(schedule, gaussian):
    """With all steps. Algorithm 2 itself misses up to 1.5 % of the std (next test)."""
    mean, std = law(DDPM(), gaussian, schedule)
    bias = schedule.alpha[-1].item() * gaussian.mean  # x_T ~ N(0, 1), not N(alpha_T mean, ...)
    assert abs(mean - gaussian.mean) < bias + 1e-5
    assert std == pytest.approx(gaussian.std, rel=0.015)


def test_the_variance_error_of_algorithm_2_vanishes_with_the_steps(gaussian):
    """beta-tilde leaves out the variance of x0 given x_t, of order log(T) / T: half with twice the steps."""
    tables = [Linear(n, 0.1 / n, 20 / n) for n in (1000, 2000, 4000)]
    lost = [gaussian.std**2 - moments(lambda step: posterior(step)[2], s, gaussian, None)[1] for s in tables]
    assert all(1.9 < a / b < 2 for a, b in pairwise(lost)) and lost[0] < 0.02 * gaussian.std**2


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_few_steps_have_the_law_of_their_recursion(schedule, eta, gaussian):
    mean, variance = moments(lambda step: eta * posterior(step)[2], schedule, gaussian, 20)
    found_mean, found_std = law(DDIM(20, eta), gaussian, schedule)
    assert (found_mean, found_std**2) == (pytest.approx(mean, rel=1e-5), pytest.approx(variance, rel=1e-4))


@every_schedule
@pytest.mark.parametrize("sampler", [*DETERMINISTIC, *RANDOM])
def test_more_steps_approach_the_data(sampler, schedule, gaussian):
    """Sixteen times the steps leave a sixth of the error of the spread or less; first order with a
    logarithm, as ancestral sampling has it, leaves log(320) / log(20) / 16 = 1 / 8 and a little.
    """
    few, many = (law(sampler(n), gaussian, schedule) for n in (20, 320))
    assert abs(many[1] - gaussian.std) < abs(few[1] - gaussian.std) / 6
    assert abs(many[0] - gaussian.mean) < schedule.alpha[-1].item() * gaussian.mean + 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "near"),
    [
        (DDIM(1000), 0.002),
        (DPMSolver(1000), 0.0004),
        (Heun(1000), 0.0004),
        (PLMS(1000), 0.001),
        (UniPC(1000), 0.0004),
        (UniPC(1000, order=3), 0.0004),
    ],
)
def test_deterministic_sampling_reaches_the_exact_flow(schedule, sampler, near, gaussian):
    offset, slope = affine(sampler, gaussian, schedule)
    exact_offset, exact_slope = flow(gaussian, schedule)
    assert offset == pytest.approx(exact_offset, abs=near)
    assert slope == pytest.approx(exact_slope, abs=near)
    # and what the exact flow makes of N(0, 1) is the data, but for the noise left at t = 0
    assert exact_slope == pytest.approx(gaussian.std, rel=0.01)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_from_pure_noise_the_flow_reaches_the_data(sampler, schedule, gaussian):
    """Nothing of x0 is in x_T, so the exact flow maps N(0, 1) to the data but for the noise left at 0."""
    offset, slope = affine(sampler(500), gaussian, schedule)
    assert offset == pytest.approx(gaussian.mean, abs=0.01)
    assert slope == pytest.approx(gaussian.std, rel=0.02)


@every_schedule
@pytest.mark.parametrize("num_steps", [10, 20, 50])
@pytest.mark.parametrize("sampler", HIGHER_ORDER)
def test_higher_order_is_nearer_to_the_data_than_first_order(sampler, schedule, num_steps, gaussian):
    """Not so if the first step, out of next to pure noise, or the last were extrapolated over."""
    near, far = (law(each(num_steps), gaussian, schedule)[1] for each in (sampler, DDIM))
    assert abs(near - gaussian.std) < abs(far - gaussian.std)


@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2), (Heun, 2), (UniPC, 3)])
def test_convergence_order(sampler, order, gaussian):
    """Halving the step divides the error by 2**order: DDIM is first order, DPM-Solver++(2M) and Heun second,
    UniP-2 too, which the corrector raises to third (Zhao et al. 2023, Theorem 3.1).

    Measured half-way, at a timestep that all of them visit: the last step is infinite in log SNR for
    any number of steps. A fine table makes the rounding of timesteps vanish.
    """
    schedule = Linear(4096, 0.1 / 4096, 5 / 4096)
    first, middle = (
        math.hypot(schedule.alpha[t].item() * gaussian.std, schedule.sigma[t].item()) for t in (4095, 2047)
    )
    errors = [abs(slope_at(2047, sampler(n), gaussian, schedule) - middle / first) for n in (16, 32, 64)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize(
    "schedule", [ZeroTerminalSNR(Linear(4096, 0.1 / 4096, 5 / 4096)), RectifiedFlow(4096)]
)
@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2), (Heun, 2), (UniPC, 3)])
def test_a_first_step_from_pure_noise_spoils_no_order(sampler, order, schedule, gaussian):
    middle = math.hypot(schedule.alpha[2047].item() * gaussian.std, schedule.sigma[2047].item())
    few, many = (abs(slope_at(2047, sampler(n), gaussian, schedule) - middle) for n in (8, 64))
    assert math.log2(few / many) / 3 > order - 0.2


def slope_at(t, sampler, data, schedule):
    """Slope of x_T -> x_t, caught as the sampler passes t."""
    seen = {}
    denoise = data.denoiser(schedule)

    def watched(x_t, times):
        seen[times[0].item()] = (x_t[1] - x_t[0]).item()
        return denoise(x_t, times)

    run(sampler, watched, schedule, points(0.0, 1.0), never)
    return seen[t]
