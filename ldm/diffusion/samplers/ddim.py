"""Implicit sampling: a few large steps along the same marginals."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.prediction import noise_of
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.timesteps import steps
from ldm.diffusion.schedule import Schedule
from ldm.types import Denoise


class DDIM(Sampler):
    """DDIM: Song et al. 2020 (arXiv:2010.02502), Eq. 12 and 16.

    Args:
        num_steps: Calls of the denoiser.
        eta: Share of the ancestral noise, in [0, 1]; 0 is deterministic, 1 has the law of DDPM.
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"sampler.eta must be in [0, 1], got {eta}")
        self.num_steps = num_steps
        self.eta = eta

    def __call__(
        self, denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Step to alpha_s x0_hat + sqrt(sigma_s**2 - std**2) eps_hat + std z (Eq. 12)."""
        x = x_T.float()
        for step in steps(schedule, self.num_steps):
            x0 = denoise(x, step.times(x)).float()
            eps = noise_of(x0, x, step.alpha, step.sigma)
            # Eq. 16
            std = self.eta * step.next_sigma / step.sigma * math.sqrt(1 - (step.alpha / step.next_alpha) ** 2)
            x = step.next_alpha * x0 + math.sqrt(step.next_sigma**2 - std**2) * eps
            if std > 0:
                x = x + std * noise(x)
        return x
