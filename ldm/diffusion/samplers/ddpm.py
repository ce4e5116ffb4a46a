"""Ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class DDPM(Sampler):
    """Ancestral sampling: Ho et al. 2020 (arXiv:2006.11239), Algorithm 2.

    The variance is the smaller of the paper's two, beta-tilde: that of q(x_s | x_t, x_0). A model that was
    trained with ``LearnedVariance`` says itself how far towards the larger one it lies (Nichol & Dhariwal
    2021, arXiv:2102.09672, Eq. 15).

    Args:
        num_steps: Calls of the denoiser; all timesteps of the schedule unless given.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int | None = None, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)

    @override
    def estimator(self, objective: Objective) -> Callable[[Network], Denoise]:
        return objective.variance_denoiser

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Draw from q(x_s | x_t, x0_hat) step by step; the last step adds no noise."""
        x = x.float()
        for step in steps:
            from_x0, from_x, std = posterior(step)
            x0, v = denoise(x, step.timesteps(x)).float().tensor_split([x.shape[1]], dim=1)
            x = from_x0 * x0 + from_x * x
            if std > 0:
                scale = std if v.shape[1] == 0 else std * _widening(step, v)
                x = x + scale * noise(x)
        return x


def posterior(step: Step) -> tuple[float, float, float]:
    """Return q(x_s | x_t, x_0) = N(a x_0 + b x_t, std**2): Ho et al. 2020, Eq. 6-7, for any s < t.

    With r = alpha_t / alpha_s and beta = sigma_t**2 - r**2 sigma_s**2, which is 1 - r**2 where variance is
    preserved: a = alpha_s beta / sigma_t**2, b = r sigma_s**2 / sigma_t**2, std**2 = beta sigma_s**2 /
    sigma_t**2.

    Returns:
        a, b and std; at the end of the trajectory 1, 0 and 0.
    """
    ratio = step.alpha / step.next_alpha
    kept = (step.next_sigma / step.sigma) ** 2
    beta = step.sigma**2 - (ratio * step.next_sigma) ** 2
    return step.next_alpha * beta / step.sigma**2, ratio * kept, math.sqrt(beta * kept)


def _widening(step: Step, v: Tensor) -> Tensor:
    """Return the learned deviation over that of beta-tilde: v = -1 is 1, v = 1 that of beta."""
    widest = step.sigma / step.next_sigma  # beta / beta-tilde is its square
    return torch.exp(math.log(widest) * (v.clamp(-1, 1) + 1) / 2)
