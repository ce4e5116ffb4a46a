"""The samplers against the ones of diffusers: trajectories of one raw network from the same noise."""

from itertools import pairwise

import diffusers
import pytest
import torch

from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import X0, Epsilon, Flow, Velocity, noise_of
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSDE
from ldm.diffusion.samplers.euler import Euler, EulerAncestral
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.spacing import Karras, Leading, Linspace, Trailing
from ldm.diffusion.samplers.unipc import UniPC
from ldm.diffusion.schedule import RectifiedFlow, ScaledLinear, ZeroTerminalSNR

PREDICTIONS = {"epsilon": Epsilon(), "v_prediction": Velocity(), "sample": X0()}
SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
every_prediction = pytest.mark.parametrize("kind", PREDICTIONS)
every_spacing = pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
SPACINGS = {"trailing": Trailing(), "leading": Leading(offset=1), "linspace": Linspace()}


def network(x, t):
    """No denoiser of anything, but different at each t and stable: it does not amplify rounding."""
    return (0.8 * x + torch.as_tensor(t).float().view(-1, 1, 1, 1) / 300).sin()


def make(scheduler, kind, spacing="trailing", **settings):
    """Make their scheduler, with exact tables: theirs are products of float32 numbers, right to 6e-5 only."""
    theirs = scheduler(**SETTINGS, prediction_type=kind, timestep_spacing=spacing, steps_offset=1, **settings)
    alpha = ScaledLinear().alpha
    theirs.alphas_cumprod = (alpha**2).float()
    theirs.alpha_t, theirs.sigma_t = alpha.float(), ScaledLinear().sigma.float()
    theirs.lambda_t = theirs.alpha_t.log() - theirs.sigma_t.log()
    return theirs


def sampled(theirs, num_steps, x=X_T, **settings):
    """Walk with them; those that work on x / alpha start there."""
    if num_steps is not None:
        theirs.set_timesteps(num_steps)
    if type(theirs).__name__.startswith(("Euler", "Heun")):
        x = x * (theirs.sigmas[0] ** 2 + 1).sqrt()
    for t in theirs.timesteps:
        output = network(theirs.scale_model_input(x, t), t.repeat(2))
        x = theirs.step(output, t, x, **settings).prev_sample
    return x


def ours(sampler, kind, schedule=None, generator=None):
    schedule = schedule or ScaledLinear()
    denoise = Objective(schedule, PREDICTIONS[kind]).denoiser(network)
    return sampler(denoise, sampler.steps(schedule), X_T, replay(generator))


def replay(generator):
    """Draw as diffusers does from this generator."""
    return lambda x: torch.randn(x.shape, generator=generator)


def seeded():
    return torch.Generator().manual_seed(5)


def assert_near(found, expected):
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@every_prediction
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_ddpm(kind, num_steps):
    theirs = make(diffusers.DDPMScheduler, kind, clip_sample=False, variance_type="fixed_small")
    expected = sampled(theirs, num_steps, generator=seeded())
    assert_near(ours(DDPM(num_steps), kind, generator=seeded()), expected)


@every_prediction
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(kind, eta):
    theirs = make(diffusers.DDIMScheduler, kind, clip_sample=False, set_alpha_to_one=True)
    expected = sampled(theirs, 20, eta=eta, generator=seeded())
    assert_near(ours(DDIM(20, eta), kind, generator=seeded()), expected)


@every_prediction
def test_ddim_on_leading_timesteps(kind):
    theirs = make(diffusers.DDIMScheduler, kind, "leading", clip_sample=False, set_alpha_to_one=True)
    assert_near(ours(DDIM(20, spacing=Leading(1)), kind), sampled(theirs, 20))


def test_ddim_steps_to_the_next_timestep_of_the_spacing():
    """Theirs always steps from t to t - T // n; the paper's Eq. 12 from tau_i to tau_{i-1}."""
    theirs = make(diffusers.DDIMScheduler, "epsilon", clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(30)
    times = theirs.timesteps.tolist()
    assert [step.t for step in DDIM(30).steps(ScaledLinear())] == times
    assert any(a - 1000 // 30 != b for a, b in pairwise(times))
    stops = iter([*times[1:], -1])
    x, objective = X_T, Objective(ScaledLinear(), Epsilon())
    for t in times:
        alpha, sigma = objective.schedule.at(torch.tensor([t, t]), x)
        eps, stop = network(x, torch.tensor([t, t])), next(stops)
        x0 = (x - sigma * eps) / alpha
        there = torch.tensor([stop, stop])
        after = objective.schedule.at(there, x) if stop >= 0 else (torch.ones(1), torch.zeros(1))
        x = after[0] * x0 + after[1] * eps
    assert_near(ours(DDIM(30), "epsilon"), x)


@every_prediction
def test_plms(kind):
    """Theirs extrapolates whatever the network predicts; the paper extrapolates the noise: they get that."""
    theirs = make(diffusers.PNDMScheduler, "epsilon", "leading", skip_prk_steps=True, set_alpha_to_one=True)
    schedule = ScaledLinear()
    denoise = Objective(schedule, PREDICTIONS[kind]).denoiser(network)
    theirs.set_timesteps(20)
    x = X_T
    for t in theirs.timesteps:
        noise = noise_of(denoise(x, t.repeat(2)), x, *schedule.at(t.repeat(2), x))
        x = theirs.step(noise, t, x).prev_sample
    assert_near(ours(PLMS(20, Leading(1)), kind), x)


@every_prediction
@every_spacing
def test_dpm_solver(kind, spacing):
    settings = {"algorithm_type": "dpmsolver++", "solver_order": 2, "euler_at_final": True}
    theirs = make(diffusers.DPMSolverMultistepScheduler, kind, **settings)
    sampler = DPMSolver(20, SPACINGS[spacing])
    theirs.set_timesteps(timesteps=[step.t for step in sampler.steps(ScaledLinear())])
    assert_near(ours(sampler, kind), sampled(theirs, None))


@every_prediction
def test_dpm_solver_sde(kind):
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "euler_at_final": True}
    theirs = make(diffusers.DPMSolverMultistepScheduler, kind, **settings)
    expected = sampled(theirs, 20, generator=seeded())
    assert_near(ours(DPMSolverSDE(20), kind, generator=seeded()), expected)


@every_prediction
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(kind, order):
    theirs = make(diffusers.UniPCMultistepScheduler, kind, solver_order=order, solver_type="bh2")
    assert_near(ours(UniPC(20, order), kind), sampled(theirs, 20))


@every_prediction
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_euler(kind, spacing):
    theirs = make(diffusers.EulerDiscreteScheduler, kind, spacing)
    assert_near(ours(Euler(20, SPACINGS[spacing]), kind), sampled(theirs, 20))


@every_prediction
def test_euler_on_the_levels_of_karras(kind):
    theirs = make(diffusers.EulerDiscreteScheduler, kind, "linspace", use_karras_sigmas=True)
    assert_near(ours(Euler(20, Karras()), kind), sampled(theirs, 20))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])  # theirs lacks x0
def test_euler_ancestral(kind):
    theirs = make(diffusers.EulerAncestralDiscreteScheduler, kind)
    expected = sampled(theirs, 20, generator=seeded())
    assert_near(ours(EulerAncestral(20), kind, generator=seeded()), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])  # theirs lacks x0
@pytest.mark.parametrize("karras", [False, True])
def test_heun(kind, karras):
    spacing = "linspace" if karras else "trailing"  # their levels lie between the ends of the spacing
    theirs = make(diffusers.HeunDiscreteScheduler, kind, spacing, use_karras_sigmas=karras)
    assert_near(ours(Heun(20, Karras() if karras else Trailing()), kind), sampled(theirs, 20))


def test_flow_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule, sampler = RectifiedFlow(), Euler(20)
    theirs.set_timesteps(sigmas=[step.sigma for step in sampler.steps(schedule)])
    x = X_T
    for t in theirs.timesteps:  # they count from T to 1, we from T - 1 to 0
        x = theirs.step(network(x, t.repeat(2) - 1), t, x).prev_sample
    denoise = Objective(schedule, Flow()).denoiser(network)
    assert_near(sampler(denoise, sampler.steps(schedule), X_T), x)


def test_flow_euler_with_a_shift():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert theirs.sigmas.flip(0).tolist() == pytest.approx(RectifiedFlow(shift=3.0).sigma.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("sampler", "theirs", "settings"),
    [
        (DPMSolver, diffusers.DPMSolverMultistepScheduler, {"euler_at_final": True}),
        (
            DPMSolverSDE,
            diffusers.DPMSolverMultistepScheduler,
            {"euler_at_final": True, "algorithm_type": "sde-dpmsolver++"},
        ),
        (UniPC, diffusers.UniPCMultistepScheduler, {}),
        (lambda n: UniPC(n, order=3), diffusers.UniPCMultistepScheduler, {"solver_order": 3}),
    ],
)
def test_higher_order_on_flow(sampler, theirs, settings):
    """From the second step on: theirs never begin in pure noise, where the noise level is infinite."""
    schedule, sampler = RectifiedFlow(shift=3.0), sampler(20)
    steps = sampler.steps(schedule)[1:]
    theirs = theirs(prediction_type="flow_prediction", use_flow_sigmas=True, **settings)
    theirs.set_timesteps(len(steps))
    theirs.sigmas = torch.tensor([*(step.sigma for step in steps), 0.0])
    theirs.timesteps = torch.tensor([step.t for step in steps])
    draw = {} if "Uni" in type(theirs).__name__ else {"generator": seeded()}
    expected = sampled(theirs, None, **draw)
    denoise = Objective(schedule, Flow()).denoiser(network)
    assert_near(sampler(denoise, steps, X_T, replay(seeded())), expected)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_ddim_on_zero_terminal_snr(kind):
    theirs = make(diffusers.DDIMScheduler, kind, clip_sample=False, set_alpha_to_one=True)
    schedule = ZeroTerminalSNR(ScaledLinear())
    theirs.alphas_cumprod = (schedule.alpha**2).float()
    assert_near(ours(DDIM(20), kind, schedule), sampled(theirs, 20))


@every_spacing
def test_timesteps(spacing):
    theirs = make(diffusers.DDIMScheduler, "epsilon", spacing)
    for num_steps in (10, 20, 50):
        theirs.set_timesteps(num_steps)
        found = [step.t for step in DDIM(num_steps, spacing=SPACINGS[spacing]).steps(ScaledLinear())]
        assert found == theirs.timesteps.tolist()


def test_levels_of_karras():
    theirs = make(diffusers.EulerDiscreteScheduler, "epsilon", "linspace", use_karras_sigmas=True)
    theirs.set_timesteps(20)
    steps = Euler(20, Karras()).steps(ScaledLinear())
    # they take 1 - abar in float32, of which four digits are left at the clean end
    assert [step.noise_level for step in steps] == pytest.approx(theirs.sigmas[:-1].tolist(), rel=1e-4)
    assert [step.t for step in steps] == pytest.approx(theirs.timesteps.tolist(), abs=2e-2)
