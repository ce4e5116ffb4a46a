"""Second-order multistep sampling: good pictures in about 20 steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.timesteps import Step, steps
from ldm.diffusion.schedule import Schedule
from ldm.types import Denoise


class DPMSolver(Sampler):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv:2211.01095), Algorithm 2.

    Deterministic. First order at the first step, which has no past, and at the last, which is
    infinite in log SNR.

    Args:
        num_steps: Calls of the denoiser.
    """

    def __init__(self, num_steps: int = 20) -> None:
        self.num_steps = num_steps

    def __call__(
        self, denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Integrate the probability flow exactly in its linear part, with x0_hat extrapolated in log SNR."""
        x = x_T.float()
        previous, previous_h = x, math.inf  # an infinite step behind: no extrapolation from it
        for step in steps(schedule, self.num_steps):
            x0, h = denoise(x, step.times(x)).float(), _log_step(step)
            ahead = h / (2 * previous_h) if math.isfinite(h) else 0.0  # 1 / (2 r)
            estimate = x0 + ahead * (x0 - previous)
            # sigma_t / sigma_s x - alpha_t (e^-h - 1) D, where alpha_t e^-h = alpha_s sigma_t / sigma_s
            kept = step.next_sigma / step.sigma
            x = kept * x + (step.next_alpha - kept * step.alpha) * estimate
            previous, previous_h = x0, h
        return x


def _log_step(step: Step) -> float:
    """Return the growth of ln(alpha / sigma); infinite from alpha = 0 and to sigma = 0."""
    if step.alpha == 0.0 or step.next_sigma == 0.0:
        return math.inf
    return math.log(step.next_alpha / step.next_sigma) - math.log(step.alpha / step.sigma)
