"""Samplers, schedules, and their exact law on a known distribution."""

import torch

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSDE
from ldm.diffusion.samplers.euler import Euler, EulerAncestral
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.unipc import UniPC
from ldm.diffusion.schedule import Cosine, Linear, RectifiedFlow, ScaledLinear, ZeroTerminalSNR

SCHEDULES = [Linear(), ScaledLinear(), Cosine()]
WITHOUT_SIGNAL = [
    ZeroTerminalSNR(ScaledLinear()),
    ZeroTerminalSNR(Cosine()),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
]
HIGHER_ORDER = [DPMSolver, Heun, PLMS, UniPC, lambda n: UniPC(n, order=3)]
DETERMINISTIC = [DDIM, Euler, *HIGHER_ORDER]
RANDOM = [DDPM, lambda n: DDIM(n, eta=0.7), EulerAncestral, DPMSolverSDE]


def never(x):
    raise AssertionError("a deterministic sampler draws no noise")


def run(sampler, denoise, schedule, x, *noise):
    return sampler(denoise, sampler.steps(schedule), x, *noise)


def wiggly(x_t, t):
    """No denoiser of anything, but smooth, bounded and different at each t."""
    return (2 * x_t + t.view(-1, 1, 1, 1) / 300).sin()


class OneByOne:
    """Noise of which each draw reaches one row only: row 2 + i for draw i, by 1."""

    def __init__(self):
        self.row = 1

    def __call__(self, x):
        self.row += 1
        return torch.zeros_like(x).index_fill_(0, torch.tensor(self.row), 1.0)


def law(sampler, data, schedule):
    """Exact mean and standard deviation of a sampler's output for N(0, 1) and Gaussian data.

    It is affine in x_T and in each draw of noise: row 0 has none of them, each other row one of them.
    """
    steps = sampler.steps(schedule)
    x = torch.zeros(len(steps) + 2, 1, 1, 1)
    x[1] = 1.0
    x0 = sampler(data.denoiser(schedule), steps, x, OneByOne()).flatten().double()
    return x0[0].item(), (x0[1:] - x0[0]).norm().item()
