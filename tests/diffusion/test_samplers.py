import math
from itertools import pairwise

import pytest
import torch

from ldm.diffusion.guidance import inpainted
from ldm.diffusion.noise import SampleNoise
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Epsilon, Flow, Sample, Velocity
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM, posterior
from ldm.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSDE
from ldm.diffusion.samplers.euler import Euler, EulerAncestral
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.timesteps import Karras, Leading, Linspace, Trailing, walk
from ldm.diffusion.samplers.unipc import UniPC
from ldm.diffusion.schedule import Cosine, Linear, RectifiedFlow, ScaledLinear, ZeroTerminalSNR

SCHEDULES = [Linear(), ScaledLinear(), Cosine()]
WITHOUT_SIGNAL = [
    ZeroTerminalSNR(ScaledLinear()),
    ZeroTerminalSNR(Cosine()),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
]
DETERMINISTIC = [DDIM, Euler, DPMSolver, Heun, PLMS, UniPC, lambda n: UniPC(n, order=3)]
RANDOM = [DDPM, lambda n: DDIM(n, eta=0.7), EulerAncestral, DPMSolverSDE]
every_sampler = pytest.mark.parametrize("sampler", [*DETERMINISTIC, *RANDOM])


def never(x):
    raise AssertionError("a deterministic sampler draws no noise")


def steps(schedule, num_steps=None):
    return walk(schedule, Trailing(), num_steps)


def run(sampler, denoise, schedule, x, *noise):
    return sampler(denoise, sampler.steps(schedule), x, *noise)


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


# --- the timesteps


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 333, 999, 1000])
def test_steps_run_from_the_noisiest_timestep_to_clean(num_steps):
    schedule = Linear()
    taken = steps(schedule, num_steps)
    times = [step.t for step in taken]
    assert len(taken) == num_steps and times[0] == 999 and len(set(times)) == num_steps
    assert all(later < earlier for earlier, later in pairwise(times))
    gaps = [earlier - later for earlier, later in zip(times, [*times[1:], -1], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert (taken[-1].next_alpha, taken[-1].next_sigma) == (1.0, 0.0)
    for step, after in pairwise(taken):
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
    x = noise.like(torch.empty(4, 1, count // 4, 1))
    x = run(DDPM(), gaussian.denoiser(schedule), schedule, x, noise.like)
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
    x = run(DDIM(20, eta), gaussian.denoiser(schedule), schedule, torch.randn(count, 1, 1, 1))
    assert abs(x.mean().item() - mean) < 5 * (variance / count) ** 0.5
    assert x.var().item() == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_second_order_is_nearer_to_the_data_than_first_order(schedule, num_steps, gaussian):
    """In the spread of the samples; not so if a step in log SNR were much longer than the one before it."""
    ddim, dpm = (affine(sampler(num_steps), gaussian, schedule)[1] for sampler in (DDIM, DPMSolver))
    assert abs(dpm - gaussian.std) < abs(ddim - gaussian.std)


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


def slope_at(t, sampler, data, schedule):
    """Slope of x_T -> x_t, caught as the sampler passes t."""
    seen = {}
    denoise = data.denoiser(schedule)

    def watched(x_t, times):
        seen[times[0].item()] = (x_t[1] - x_t[0]).item()
        return denoise(x_t, times)

    run(sampler, watched, schedule, points(0.0, 1.0), never)
    return seen[t]


# --- identities between samplers


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [None, 20])
def test_ddim_with_eta_one_is_ddpm(schedule, num_steps):
    """Equal coefficients of x0_hat and noise: the same noise leads to the same sample, for any denoiser."""
    x, keys = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), ["a", "b"]
    ddpm = run(DDPM(num_steps), wiggly, schedule, x, SampleNoise(1, keys).like)
    ddim = run(DDIM(num_steps or schedule.num_steps, eta=1.0), wiggly, schedule, x, SampleNoise(1, keys).like)
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


@every_sampler
def test_one_step_returns_the_estimate(sampler):
    x, sampler = torch.randn(3, 1, 2, 2), sampler(1)
    assert torch.allclose(
        run(sampler, wiggly, Linear(), x, never), wiggly(x, torch.tensor([999] * 3)), atol=1e-6
    )


@every_sampler
@pytest.mark.parametrize("schedule", [ScaledLinear(), *WITHOUT_SIGNAL])
def test_a_denoiser_that_knows_x0_is_believed(sampler, schedule):
    x0, asked = torch.randn(2, 1, 3, 3), []

    def oracle(x_t, t):
        asked.append(t)
        return x0

    assert torch.allclose(run(sampler(7), oracle, schedule, torch.randn_like(x0)), x0, atol=1e-5)
    assert all(t.shape == (2,) and t.dtype == torch.int64 for t in asked)


@pytest.mark.parametrize(
    ("sampler", "calls"), [(DDPM, 7), (DDIM, 7), (DPMSolver, 7), (UniPC, 7), (Heun, 13), (PLMS, 8)]
)
def test_the_number_of_calls(sampler, calls):
    asked = []

    def counted(x_t, t):
        asked.append(t)
        return x_t.sin()

    run(sampler(7), counted, Cosine(), torch.randn(1, 1, 2, 2))
    assert len(asked) == calls


@every_sampler
def test_a_sample_does_not_depend_on_its_batch(sampler):
    keys = ["a", "b", "c"]

    def draw(names):
        noise = SampleNoise(3, names)
        return run(sampler(9), wiggly, Linear(), noise.like(torch.empty(len(names), 2, 4, 4)), noise.like)

    assert torch.equal(draw(keys)[1:], draw(keys[1:]))


@every_sampler
def test_all_predictions_give_the_same_sample(sampler, gaussian):
    """The same knowledge of the data, said as eps, v, x0 or u, through Objective.denoiser."""
    schedule, x = ScaledLinear(), torch.randn(4, 1, 1, 1)
    drawn = []
    for prediction in (Epsilon(), Velocity(), Sample(), Flow()):

        def model(x_t, t, prediction=prediction):
            alpha, sigma = schedule.at(t, x_t)
            x0 = gaussian.denoiser(schedule)(x_t, t)
            return prediction.target(x0, (x_t - alpha * x0) / sigma, alpha, sigma)

        denoise = Objective(schedule, prediction).denoiser(model)
        drawn.append(run(sampler(20), denoise, schedule, x, SampleNoise(0, list("abcd")).like))
    assert all(torch.allclose(x, drawn[2], atol=1e-4) for x in drawn)


@every_sampler
@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_schedules_that_end_in_pure_noise_are_sampled_without_nan(sampler, schedule, gaussian):
    x = run(sampler(20), gaussian.denoiser(schedule), schedule, torch.randn(64, 1, 4, 4))
    assert x.isfinite().all() and x.mean().item() == pytest.approx(gaussian.mean, abs=5 * gaussian.std / 32)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("schedule", WITHOUT_SIGNAL)
def test_from_pure_noise_the_flow_reaches_the_data(sampler, schedule, gaussian):
    """Nothing of x0 is in x_T, so the exact flow maps N(0, 1) to the data but for the noise left at 0."""
    offset, slope = affine(sampler(500), gaussian, schedule)
    assert offset == pytest.approx(gaussian.mean, abs=0.01)
    assert slope == pytest.approx(gaussian.std, rel=0.02)


@pytest.mark.parametrize("schedule", [*SCHEDULES, *WITHOUT_SIGNAL])
def test_euler_is_ddim_and_euler_ancestral_is_ddpm(schedule):
    x, keys = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), ["a", "b"]

    def sample(sampler):
        return run(sampler, wiggly, schedule, x, SampleNoise(1, keys).like)

    assert torch.equal(sample(Euler(20)), sample(DDIM(20)))
    assert torch.equal(sample(EulerAncestral(20)), sample(DDIM(20, eta=1.0)))
    assert torch.allclose(sample(EulerAncestral(20)), sample(DDPM(20)), atol=1e-5)


def test_an_euler_step_follows_the_slope_in_both_coordinates():
    """d(x / alpha) / d rho = eps, and on the straight line dx / d sigma = eps - x0."""
    x, x0 = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for schedule in (ScaledLinear(), RectifiedFlow()):
        step = Euler(20).steps(schedule)[5]
        eps = (x - step.alpha * x0) / step.sigma
        after = Euler(20)(lambda x, t: x0, [step], x)
        scaled = x / step.alpha + (step.next_rho - step.rho) * eps
        assert torch.allclose(after, step.next_alpha * scaled, atol=1e-5)
        if isinstance(schedule, RectifiedFlow):
            assert torch.allclose(after, x + (step.next_sigma - step.sigma) * (eps - x0), atol=1e-5)


@pytest.mark.parametrize("spacing", [Leading(0), Leading(1), Linspace(), Karras()])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_a_spacing_falls_and_stays_within_the_schedule(spacing, num_steps):
    taken = DDIM(num_steps, spacing=spacing).steps(ScaledLinear())
    times = [step.t for step in taken]
    assert len(taken) == num_steps and times[-1] >= 0 and times[0] <= 999
    assert all(later < earlier for earlier, later in pairwise(times))
    assert (taken[-1].next_alpha, taken[-1].next_sigma) == (1.0, 0.0)


def test_the_levels_of_karras_are_eq_5():
    levels = [step.rho ** (1 / 7) for step in Heun(20, Karras()).steps(Linear())]
    gaps = [earlier - later for earlier, later in pairwise(levels)]
    assert gaps == pytest.approx([gaps[0]] * 19, rel=1e-6)
    assert (levels[0] ** 7, levels[-1] ** 7) == pytest.approx(Linear().rho[[-1, 0]].tolist())


def test_karras_needs_a_largest_level():
    with pytest.raises(
        ValueError, match=r"sampler\.spacing: Karras .* RectifiedFlow ends in pure noise.*Trailing"
    ):
        Heun(20, Karras()).steps(RectifiedFlow())


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_walk_may_begin_in_the_middle(sampler):
    """From x0 noised to its first level, with the right estimate, it comes back to x0."""
    x0, eps, sampler = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), sampler(20)
    steps = sampler.steps(ScaledLinear())[12:]
    x = steps[0].alpha * x0 + steps[0].sigma * eps
    assert torch.allclose(sampler(lambda x, t: x0, steps, x, never), x0, atol=1e-5)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("schedule", [ScaledLinear(), RectifiedFlow()])
def test_what_is_known_stays_at_the_noised_known_in_every_step(sampler, schedule):
    known, eps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    mask = (torch.arange(4) < 2).float().expand(2, 1, 4, 4)

    def watched(x_t, t):
        alpha, sigma = schedule.at(t, x_t)
        there = mask == 0
        assert torch.allclose(x_t[there], (alpha * known + sigma * eps)[there], atol=2e-5)
        return wiggly(x_t, t)

    sampler = sampler(20)
    steps = sampler.steps(schedule)[5:]
    x = steps[0].alpha * known + steps[0].sigma * eps
    drawn = sampler(inpainted(watched, known, mask), steps, x, never)
    assert torch.allclose(drawn[mask == 0], known[mask == 0], atol=2e-5)
    assert (drawn - known)[mask > 0].abs().max() > 0.1


@every_sampler
def test_samples_stay_float32_around_a_half_precision_network(sampler):
    def half(x_t, t):
        assert x_t.dtype == torch.float32
        return wiggly(x_t, t).bfloat16()

    assert run(sampler(5), half, Linear(), torch.randn(1, 1, 2, 2).bfloat16()).dtype == torch.float32


def wiggly(x_t, t):
    """No denoiser of anything, but smooth, bounded and different at each t."""
    return (2 * x_t + t.view(-1, 1, 1, 1) / 300).sin()
