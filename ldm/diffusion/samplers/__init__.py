"""One sampler per file: from noise and a function that estimates x0 to a sample; all of them can be named."""

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverSDE
from ldm.diffusion.samplers.euler import Euler, EulerAncestral
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.plms import PLMS
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Karras, Leading, Linspace, Trailing
from ldm.diffusion.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "PLMS",
    "DPMSolver",
    "DPMSolverSDE",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Karras",
    "Leading",
    "Linspace",
    "Sampler",
    "Trailing",
    "UniPC",
]
