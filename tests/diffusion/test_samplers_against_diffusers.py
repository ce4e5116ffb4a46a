"""The samplers against the ones of diffusers, whole walks on the same timesteps and noise."""

import diffusers
import pytest
import torch

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.dpm_solver import DPMSolver
from ldm.diffusion.samplers.timesteps import steps
from ldm.diffusion.schedule import ScaledLinear

SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "sample",
    "timestep_spacing": "trailing",
}
X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def denoise(x_t, t):
    """No denoiser of anything, but different at each t and stable: it does not amplify rounding."""
    return (0.8 * x_t + t.view(-1, 1, 1, 1) / 300).sin()


def walk(scheduler, num_steps, **settings):
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == [step.t for step in steps(ScaledLinear(), num_steps)]
    x = X_T
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.repeat(2)), t, x, **settings).prev_sample
    return x


def replay(generator):
    """Draw as diffusers does from this generator."""
    return lambda x: torch.randn(x.shape, generator=generator)


# Tolerance: their tables are float32 products, right to about 6e-5 (see test_schedule).


@pytest.mark.parametrize("num_steps", [10, 20, 1000])
def test_ddpm(num_steps):
    theirs = diffusers.DDPMScheduler(**SETTINGS, clip_sample=False, variance_type="fixed_small")
    expected = walk(theirs, num_steps, generator=torch.Generator().manual_seed(5))
    found = DDPM(num_steps)(denoise, ScaledLinear(), X_T, replay(torch.Generator().manual_seed(5)))
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("num_steps", [10, 20, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(num_steps, eta):
    theirs = diffusers.DDIMScheduler(**SETTINGS, clip_sample=False, set_alpha_to_one=True)
    generator = torch.Generator().manual_seed(5)
    expected = walk(theirs, num_steps, eta=eta, generator=generator)
    found = DDIM(num_steps, eta)(denoise, ScaledLinear(), X_T, replay(torch.Generator().manual_seed(5)))
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("num_steps", [2, 10, 15, 20, 33])
def test_dpm_solver(num_steps):
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SETTINGS, algorithm_type="dpmsolver++", solver_order=2, euler_at_final=True
    )
    found = DPMSolver(num_steps)(denoise, ScaledLinear(), X_T)
    assert torch.allclose(found, walk(theirs, num_steps), atol=1e-3)
