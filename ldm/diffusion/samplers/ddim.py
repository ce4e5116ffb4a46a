"""Implicit sampling: a few large steps along the same marginals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import noise_of
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class DDIM(Sampler):
    """DDIM: Song et al. 2020 (arXiv:2010.02502), Eq. 12 and 16.

    Args:
        num_steps: Calls of the denoiser.
        eta: Share of the ancestral noise, in [0, 1]; 0 is deterministic, 1 has the law of DDPM.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0, spacing: Spacing | None = None) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"sampler.eta must be in [0, 1], got {eta}")
        super().__init__(num_steps, spacing)
        self.eta = eta

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Step to alpha_s x0_hat + sqrt(sigma_s**2 - std**2) eps_hat + std z (Eq. 12)."""
        x = x.float()
        for step in steps:
            x0 = denoise(x, step.timesteps(x)).float()
            eps = noise_of(x0, x, step.alpha, step.sigma)
            std = self.eta * ancestral_std(step)
            x = step.next_alpha * x0 + math.sqrt(step.next_sigma**2 - std**2) * eps
            if std > 0:
                x = x + std * noise(x)
        return x


def ancestral_std(step: Step) -> float:
    """Return the standard deviation of q(x_s | x_t, x_0): sigma_s sqrt(1 - l_s**2 / l_t**2).

    Song et al. 2020, Eq. 16 with eta = 1, written with the noise level l = sigma / alpha: it holds on any
    schedule.
    """
    return step.next_sigma * math.sqrt(1 - (step.next_noise_level / step.noise_level) ** 2)
