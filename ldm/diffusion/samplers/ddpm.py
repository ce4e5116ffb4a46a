"""Ancestral sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.timesteps import Step, steps
from ldm.diffusion.schedule import Schedule
from ldm.types import Denoise


class DDPM(Sampler):
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), Algorithm 2.

    The variance is the smaller of the paper's two, beta-tilde: that of q(x_s | x_t, x_0).

    Args:
        num_steps: Calls of the denoiser; all timesteps of the schedule unless given.
    """

    def __init__(self, num_steps: int | None = None) -> None:
        self.num_steps = num_steps

    def __call__(
        self, denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Draw from q(x_s | x_t, x0_hat) step by step; the last step adds no noise."""
        x = x_T.float()
        for step in steps(schedule, self.num_steps):
            from_x0, from_x, std = posterior(step)
            x = from_x0 * denoise(x, step.times(x)).float() + from_x * x
            if std > 0:
                x = x + std * noise(x)
        return x


def posterior(step: Step) -> tuple[float, float, float]:
    """Return q(x_s | x_t, x_0) = N(a x_0 + b x_t, std**2): Ho et al. 2020, Eq. 6-7, for any s < t.

    With r = alpha_t / alpha_s and beta = 1 - r**2: a = alpha_s beta / sigma_t**2,
    b = r sigma_s**2 / sigma_t**2, std**2 = beta sigma_s**2 / sigma_t**2.

    Returns:
        a, b and std; at the end of the walk 1, 0 and 0.
    """
    ratio = step.alpha / step.next_alpha
    beta, kept = 1 - ratio**2, (step.next_sigma / step.sigma) ** 2
    if step.next_sigma == 0.0:
        return 1.0, 0.0, 0.0  # exactly, where beta = sigma**2 only to rounding
    return step.next_alpha * beta / step.sigma**2, ratio * kept, math.sqrt(beta * kept)
