import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.noise import SampleNoise
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Epsilon, Sample, Velocity
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM, posterior
from ldm.diffusion.samplers.dpm_solver import DPMSolver
from ldm.diffusion.samplers.timesteps import steps
from ldm.diffusion.schedule import Cosine, Linear, ScaledLinear

SCHEDULES = [Linear(), ScaledLinear(), Cosine()]


def never(x):
    raise AssertionError("a deterministic sampler draws no noise")


def points(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


def affine(sampler, data, schedule):
    """The map x_T -> x0 of a deterministic sampler on Gaussian data is affine: return offset and slope."""
    x = sampler(data.denoiser(schedule), schedule, points(0.0, 1.0), never).flatten()
    return x[0].item(), (x[1] - x[0]).item()


def flow(data, schedule):
    """Offset and slope of the exact probability flow from T - 1 to 0, followed by x0_hat.

    It keeps (x_t - alpha mean) / std_t, where std_t**2 = alpha**2 std**2 + sigma**2.
    """
    first, last = ((schedule.alpha[i].item(), schedule.sigma[i].item()) for i in (-1, 0))
    std_first, std_last = (math.hypot(alpha * data.std, sigma) for alpha, sigma in (first, last))
    slope = data.std**2 * last[0] / std_last / std_first
    return data.mean * (1 - slope * first[0]), slope


# --- the timesteps


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 333, 999, 1000])
def test_steps_run_from_the_noisiest_timestep_to_clean(num_steps):
    schedule = Linear()
    walk = steps(schedule, num_steps)
    times = [step.t for step in walk]
    assert len(walk) == num_steps and times[0] == 999 and len(set(times)) == num_steps
    assert all(later < earlier for earlier, later in pairwise(times))
    gaps = [earlier - later for earlier, later in zip(times, [*times[1:], -1], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert (walk[-1].next_alpha, walk[-1].next_sigma) == (1.0, 0.0)
    for step, after in pairwise(walk):
        assert (step.next_alpha, step.next_sigma) == (after.alpha, after.sigma)
        assert step.alpha == schedule.alpha[step.t].item()


def test_no_number_visits_all():
    assert [step.t for step in steps(Linear(10, 0.01, 0.5))] == list(range(9, -1, -1))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"sampler.num_steps must be in \[1, 1000\].*got {num_steps}"):
        steps(Linear(), num_steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match=rf"sampler.eta must be in \[0, 1\], got {eta}"):
        DDIM(eta=eta)


# --- Gaussian data, whose denoiser is known


def moments(sampler_std, schedule, data, num_steps):
    """Exact mean and variance of what a one-step-noise sampler returns from N(0, 1), by its recursion."""
    mean, variance = 0.0, 1.0
    for step in steps(schedule, num_steps):
        std = sampler_std(step)
        direction = math.sqrt(step.next_sigma**2 - std**2) / step.sigma
        gain = data.std**2 * step.alpha / (step.alpha**2 * data.std**2 + step.sigma**2)
        slope = direction + (step.next_alpha - direction * step.alpha) * gain
        offset = (step.next_alpha - direction * step.alpha) * data.mean * (1 - gain * step.alpha)
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ancestral_sampling_ends_at_mean_and_variance_of_the_data(schedule, gaussian):
    """All steps. Algorithm 2 itself misses up to 1.5 % of the std (next test); then five standard errors."""
    count = 4000
    noise = SampleNoise(0, ["a", "b", "c", "d"])
    x = DDPM()(
        gaussian.denoiser(schedule), schedule, noise.like(torch.empty(4, 1, count // 4, 1)), noise.like
    )
    bias = schedule.alpha[-1].item() * gaussian.mean  # x_T ~ N(0, 1), not N(alpha_T mean, ...)
    assert abs(x.mean().item() - gaussian.mean) < bias + 5 * gaussian.std / count**0.5
    assert x.std().item() == pytest.approx(gaussian.std, rel=0.015 + 5 / (2 * count) ** 0.5)


def test_what_algorithm_2_misses_of_the_variance_vanishes_with_the_steps(gaussian):
    """beta-tilde leaves out the variance of x0 given x_t, of order log(T) / T: half with twice the steps."""
    tables = [Linear(n, 0.1 / n, 20 / n) for n in (1000, 2000, 4000)]
    lost = [gaussian.std**2 - moments(lambda step: posterior(step)[2], s, gaussian, None)[1] for s in tables]
    assert all(1.9 < a / b < 2 for a, b in pairwise(lost)) and lost[0] < 0.02 * gaussian.std**2


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_few_steps_have_the_law_of_their_recursion(schedule, eta, gaussian):
    """Eq. 12 of Song et al. 2020 on Gaussian data is a linear recursion, whose law is known exactly."""
    count = 40_000
    mean, variance = moments(lambda step: eta * posterior(step)[2], schedule, gaussian, 20)
    torch.manual_seed(0)
    x = DDIM(20, eta)(gaussian.denoiser(schedule), schedule, torch.randn(count, 1, 1, 1))
    assert abs(x.mean().item() - mean) < 5 * (variance / count) ** 0.5
    assert x.var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sampler", "near"), [(DDIM(1000), 0.002), (DPMSolver(1000), 0.0004)])
def test_deterministic_sampling_reaches_the_exact_flow(schedule, sampler, near, gaussian):
    offset, slope = affine(sampler, gaussian, schedule)
    exact_offset, exact_slope = flow(gaussian, schedule)
    assert offset == pytest.approx(exact_offset, abs=near)
    assert slope == pytest.approx(exact_slope, abs=near)
    # and what the exact flow makes of N(0, 1) is the data, but for the noise left at t = 0
    assert exact_slope == pytest.approx(gaussian.std, rel=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_second_order_is_nearer_to_the_data_than_first_order(schedule, num_steps, gaussian):
    """In the spread of the samples; not so if a step in log SNR were much longer than the one before it."""
    ddim, dpm = (affine(sampler(num_steps), gaussian, schedule)[1] for sampler in (DDIM, DPMSolver))
    assert abs(dpm - gaussian.std) < abs(ddim - gaussian.std)


@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2)])
def test_convergence_order(sampler, order, gaussian):
    """Halving the step divides the error by 2**order: DDIM is first order, DPM-Solver++(2M) second.

    Measured half-way, at a timestep that all of them visit: the last step is infinite in log SNR for
    any number of steps. A fine table makes the rounding of timesteps vanish.
    """
    schedule = Linear(4096, 0.1 / 4096, 20 / 4096)
    first, middle = (
        math.hypot(schedule.alpha[t].item() * gaussian.std, schedule.sigma[t].item()) for t in (4095, 2047)
    )
    errors = [abs(slope_at(2047, sampler(n), gaussian, schedule) - middle / first) for n in (16, 32, 64)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates == pytest.approx([order] * 2, abs=0.2)


def slope_at(t, sampler, data, schedule):
    """Slope of x_T -> x_t, caught as the sampler passes t."""
    seen = {}
    denoise = data.denoiser(schedule)

    def watched(x_t, times):
        seen[times[0].item()] = (x_t[1] - x_t[0]).item()
        return denoise(x_t, times)

    sampler(watched, schedule, points(0.0, 1.0), never)
    return seen[t]


# --- identities between samplers


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [None, 20])
def test_ddim_with_eta_one_is_ddpm(schedule, num_steps):
    """Equal coefficients of x0_hat and noise: the same noise leads to the same sample, for any denoiser."""
    x, keys = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), ["a", "b"]
    ddpm = DDPM(num_steps)(wiggly, schedule, x, SampleNoise(1, keys).like)
    ddim = DDIM(num_steps or schedule.num_steps, eta=1.0)(wiggly, schedule, x, SampleNoise(1, keys).like)
    assert torch.allclose(ddpm, ddim, atol=1e-5)


def test_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) from the precisions of q(x_s | x_0) and q(x_t | x_s)."""
    for step in steps(Linear(), 50)[:-1]:
        ratio = step.alpha / step.next_alpha
        beta = step.sigma**2 - (ratio * step.next_sigma) ** 2
        variance = 1 / (1 / step.next_sigma**2 + ratio**2 / beta)
        from_x0, from_x, std = posterior(step)
        assert std**2 == pytest.approx(variance, rel=1e-9)
        assert from_x0 == pytest.approx(variance * step.next_alpha / step.next_sigma**2, rel=1e-9)
        assert from_x == pytest.approx(variance * ratio / beta, rel=1e-9)


def test_posterior_mean_is_line_4_of_algorithm_2():
    """(x_t - beta_t / sigma_t eps) / sqrt(1 - beta_t), with x0_hat = (x_t - sigma_t eps) / alpha_t."""
    x_t, eps = 0.3, -1.2
    for step in steps(Linear()):
        from_x0, from_x, _ = posterior(step)
        beta = 1 - (step.alpha / step.next_alpha) ** 2
        expected = (x_t - beta / step.sigma * eps) / math.sqrt(1 - beta)
        x0 = (x_t - step.sigma * eps) / step.alpha
        assert from_x0 * x0 + from_x * x_t == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sampler", [DDPM(1), DDIM(1), DPMSolver(1), DDIM(1, eta=1.0)])
def test_one_step_returns_the_estimate(sampler):
    x = torch.randn(3, 1, 2, 2)
    assert torch.allclose(sampler(wiggly, Linear(), x, never), wiggly(x, torch.tensor([999] * 3)), atol=1e-6)


@pytest.mark.parametrize("sampler", [DDPM(7), DDIM(7), DDIM(7, eta=0.7), DPMSolver(7)])
def test_a_denoiser_that_knows_x0_is_believed_and_called_once_per_step(sampler):
    x0, asked = torch.randn(2, 1, 3, 3), []

    def oracle(x_t, t):
        asked.append(t)
        return x0

    assert torch.allclose(sampler(oracle, Cosine(), torch.randn_like(x0)), x0, atol=1e-5)
    assert len(asked) == 7 and all(t.shape == (2,) and t.dtype == torch.int64 for t in asked)


@pytest.mark.parametrize("sampler", [DDPM(9), DDIM(9), DDIM(9, eta=0.7), DPMSolver(9)])
def test_a_sample_does_not_depend_on_its_batch(sampler):
    keys = ["a", "b", "c"]

    def draw(names):
        noise = SampleNoise(3, names)
        return sampler(wiggly, Linear(), noise.like(torch.empty(len(names), 2, 4, 4)), noise.like)

    assert torch.equal(draw(keys)[1:], draw(keys[1:]))


@pytest.mark.parametrize("sampler", [DDIM(20), DPMSolver(20), DDPM(20)])
def test_all_predictions_give_the_same_sample(sampler, gaussian):
    """The same knowledge of the data, said as eps, v or x0, through Objective.denoiser."""
    schedule, x = ScaledLinear(), torch.randn(4, 1, 1, 1)
    drawn = []
    for prediction in (Epsilon(), Velocity(), Sample()):

        def model(x_t, t, prediction=prediction):
            alpha, sigma = schedule.at(t, x_t)
            x0 = gaussian.denoiser(schedule)(x_t, t)
            return prediction.target(x0, (x_t - alpha * x0) / sigma, alpha, sigma)

        denoise = Objective(schedule, prediction).denoiser(model)
        drawn.append(sampler(denoise, schedule, x, SampleNoise(0, list("abcd")).like))
    assert torch.allclose(drawn[0], drawn[2], atol=1e-4) and torch.allclose(drawn[1], drawn[2], atol=1e-4)


@pytest.mark.parametrize("sampler", [DDPM(10), DDIM(10), DPMSolver(10)])
def test_zero_terminal_snr_is_sampled_without_nan(sampler, gaussian):
    """At alpha = 0 nothing divides by it: schedules without a rest of signal need no other samplers."""
    schedule = Cosine(max_beta=1.0)
    schedule.alpha[-1], schedule.sigma[-1] = 0.0, 1.0
    x = sampler(gaussian.denoiser(schedule), schedule, torch.randn(64, 1, 4, 4))
    assert x.isfinite().all() and x.mean().item() == pytest.approx(gaussian.mean, abs=0.1)


@pytest.mark.parametrize("sampler", [DDPM(5), DDIM(5), DPMSolver(5)])
def test_samples_stay_float32_around_a_half_precision_network(sampler):
    def half(x_t, t):
        assert x_t.dtype == torch.float32
        return wiggly(x_t, t).bfloat16()

    assert sampler(half, Linear(), torch.randn(1, 1, 2, 2).bfloat16()).dtype == torch.float32


def wiggly(x_t, t):
    """No denoiser of anything, but smooth, bounded and different at each t."""
    return (2 * x_t + t.view(-1, 1, 1, 1) / 300).sin()
