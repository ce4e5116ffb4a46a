"""Second-order multistep sampling: good images in about 20 steps, deterministic or with noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class DPMSolver(Sampler):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), Algorithm 2.

    Deterministic. First order at the first step, which has no past, and at the last, which is
    infinite in log SNR.

    Args:
        num_steps: Calls of the denoiser.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 20, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Integrate the probability flow exactly in its linear part, with x0_hat extrapolated in log SNR."""
        x = x.float()
        previous, previous_h = x, math.inf  # an infinite step behind: no extrapolation from it
        for step in steps:
            x0, h = denoise(x, step.timesteps(x)).float(), log_step(step)
            ahead = h / (2 * previous_h) if math.isfinite(h) else 0.0  # 1 / (2 r)
            x = self._move(step, x, x0 + ahead * (x0 - previous), noise)
            previous, previous_h = x0, h
        return x

    def _move(self, step: Step, x: Tensor, estimate: Tensor, noise: Noise) -> Tensor:
        # sigma_t / sigma_s x - alpha_t (e^-h - 1) D, where alpha_t e^-h = alpha_s sigma_t / sigma_s
        kept = step.next_sigma / step.sigma
        return kept * x + (step.next_alpha - kept * step.alpha) * estimate


class DPMSolverSDE(DPMSolver):
    """SDE-DPM-Solver++(2M), the same for the diffusion with noise: Lu et al. 2022 (arXiv:2211.01095).

    Args:
        num_steps: Calls of the denoiser.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def _move(self, step: Step, x: Tensor, estimate: Tensor, noise: Noise) -> Tensor:
        """Step to sigma_t / sigma_s e^-h x + alpha_t (1 - e^-2h) D + sigma_t sqrt(1 - e^-2h) z."""
        decay = step.next_noise_level / step.noise_level  # e^-h
        fresh = 1 - decay**2
        x = step.next_sigma / step.sigma * decay * x + step.next_alpha * fresh * estimate
        return x + step.next_sigma * math.sqrt(fresh) * noise(x) if step.next_sigma > 0 else x


def log_step(step: Step) -> float:
    """Return h, the growth of ln(alpha / sigma); infinite from alpha = 0 and to sigma = 0."""
    if step.alpha == 0.0 or step.next_sigma == 0.0:
        return math.inf
    return math.log(step.noise_level / step.next_noise_level)
