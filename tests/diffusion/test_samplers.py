import math

import pytest
import torch
from trajectories import DETERMINISTIC, RANDOM, SCHEDULES, WITHOUT_SIGNAL, never, run, wiggly

from ldm.diffusion.guidance import inpainted
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import X0, Epsilon, Flow, Velocity
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM, posterior
from ldm.diffusion.samplers.dpm_solver import DPMSolver
from ldm.diffusion.samplers.euler import Euler, EulerAncestral
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.unipc import UniPC
from ldm.diffusion.schedule import Cosine, Linear, RectifiedFlow, ScaledLinear
from ldm.rng import SampleNoise

every_sampler = pytest.mark.parametrize("sampler", [*DETERMINISTIC, *RANDOM])


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match=rf"sampler.eta must be in \[0, 1\], got {eta}"):
        DDIM(eta=eta)


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
    for step in DDPM(50).steps(Linear())[:-1]:
        ratio = step.alpha / step.next_alpha
        beta = step.sigma**2 - (ratio * step.next_sigma) ** 2
        variance = 1 / (1 / step.next_sigma**2 + ratio**2 / beta)
        from_x0, from_x, std = posterior(step)
        assert std**2 == pytest.approx(variance, rel=1e-9)
        assert from_x0 == pytest.approx(variance * step.next_alpha / step.next_sigma**2, rel=1e-9)
        assert from_x == pytest.approx(variance * ratio / beta, rel=1e-9)


def test_posterior_at_the_end_of_the_trajectory_is_the_estimate():
    for schedule in (Linear(), RectifiedFlow(), Cosine(1)):
        assert posterior(DDPM().steps(schedule)[-1]) == (1.0, 0.0, 0.0)


def test_posterior_mean_is_line_4_of_algorithm_2():
    """(x_t - beta_t / sigma_t eps) / sqrt(1 - beta_t), with x0_hat = (x_t - sigma_t eps) / alpha_t."""
    x_t, eps = 0.3, -1.2
    for step in DDPM().steps(Linear()):
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
    x0, timesteps = torch.randn(2, 1, 3, 3), []

    def oracle(x_t, t):
        timesteps.append(t)
        return x0

    assert torch.allclose(run(sampler(7), oracle, schedule, torch.randn_like(x0)), x0, atol=1e-5)
    assert all(t.shape == (2,) and t.dtype == torch.int64 for t in timesteps)


@pytest.mark.parametrize(
    ("sampler", "calls"), [(DDPM, 7), (DDIM, 7), (DPMSolver, 7), (UniPC, 7), (Heun, 13), (PLMS, 8)]
)
def test_the_number_of_calls(sampler, calls):
    timesteps = []

    def counted(x_t, t):
        timesteps.append(t)
        return x_t.sin()

    run(sampler(7), counted, Linear(), torch.randn(1, 1, 2, 2))
    assert len(timesteps) == calls
    if sampler in (Heun, PLMS):  # the step out of next to pure noise is DDIM's
        before = len(timesteps)
        run(sampler(7), counted, Cosine(), torch.randn(1, 1, 2, 2))
        assert len(timesteps) - before == (calls - 1 if sampler is Heun else calls)


@every_sampler
def test_a_sample_does_not_depend_on_its_batch(sampler):
    keys = ["a", "b", "c"]

    def draw(names):
        noise = SampleNoise(3, names)
        return run(sampler(9), wiggly, Linear(), noise.like(torch.empty(len(names), 2, 4, 4)), noise.like)

    # a row of three is not computed like one of two: the sine of a last few numbers may round otherwise
    assert torch.allclose(draw(keys)[1:], draw(keys[1:]), atol=1e-5)


@every_sampler
def test_all_predictions_give_the_same_sample(sampler, gaussian):
    """The same estimate expressed as eps, v, x0 or u, through Objective.denoiser."""
    schedule, x = ScaledLinear(), torch.randn(4, 1, 1, 1)
    drawn = []
    for prediction in (Epsilon(), Velocity(), X0(), Flow()):

        def model(x_t, t, prediction=prediction):
            alpha, sigma = schedule.at(t, x_t)
            x0 = gaussian.denoiser(schedule)(x_t, t)
            return prediction.target(x0, (x_t - alpha * x0) / sigma, alpha, sigma)

        denoise = Objective(schedule, prediction).denoiser(model)
        drawn.append(run(sampler(20), denoise, schedule, x, SampleNoise(0, list("abcd")).like))
    assert all(torch.allclose(x, drawn[2], atol=1e-4) for x in drawn)


@pytest.mark.parametrize("schedule", [*SCHEDULES, *WITHOUT_SIGNAL])
def test_euler_is_ddim_and_euler_ancestral_is_ddpm(schedule):
    x, keys = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), ["a", "b"]

    def sample(sampler):
        return run(sampler, wiggly, schedule, x, SampleNoise(1, keys).like)

    assert torch.allclose(sample(Euler(20)), sample(DDIM(20)), atol=1e-5)
    assert torch.allclose(sample(EulerAncestral(20)), sample(DDIM(20, eta=1.0)), atol=1e-5)
    assert torch.allclose(sample(EulerAncestral(20)), sample(DDPM(20)), atol=1e-5)


def test_an_euler_step_follows_the_slope_in_both_coordinates():
    """d(x / alpha) / d(sigma / alpha) = eps, and on the straight line dx / d sigma = eps - x0."""
    x, x0 = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for schedule in (ScaledLinear(), RectifiedFlow()):
        step = Euler(20).steps(schedule)[5]
        eps = (x - step.alpha * x0) / step.sigma
        after = Euler(20)(lambda x, t: x0, [step], x)
        scaled = x / step.alpha + (step.next_noise_level - step.noise_level) * eps
        assert torch.allclose(after, step.next_alpha * scaled, atol=1e-5)
        if isinstance(schedule, RectifiedFlow):
            assert torch.allclose(after, x + (step.next_sigma - step.sigma) * (eps - x0), atol=1e-5)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_sampling_may_start_at_an_intermediate_timestep(sampler):
    """From x0 noised to its first level, with the right estimate, it comes back to x0."""
    x0, eps, sampler = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), sampler(20)
    steps = sampler.steps(ScaledLinear())[12:]
    x = steps[0].alpha * x0 + steps[0].sigma * eps
    assert torch.allclose(sampler(lambda x, t: x0, steps, x, never), x0, atol=1e-5)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("schedule", [ScaledLinear(), RectifiedFlow()])
def test_known_pixels_equal_the_noised_image_in_every_step(sampler, schedule):
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
