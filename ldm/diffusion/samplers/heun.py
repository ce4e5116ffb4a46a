"""Heun's method: second order with two calls a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import noise_of
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class Heun(Sampler):
    """Heun's method: Karras et al. 2022 (arXiv:2206.00364), Algorithm 1.

    It follows d(x / alpha) / d(sigma / alpha) = eps_hat. The last step, to clean, and one from next to pure
    noise are Euler's.

    Args:
        num_steps: Steps; the denoiser is called twice in each but those.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 20, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Step along the slope, then along the mean of the slopes at both ends."""
        x = x.float()
        for step in steps:
            x0 = denoise(x, step.timesteps(x)).float()
            eps = noise_of(x0, x, step.alpha, step.sigma)
            ahead = step.next_alpha * x0 + step.next_sigma * eps
            if step.next_sigma > 0.0 and not step.from_noise:
                there = denoise(ahead, step.next_times(x)).float()
                slope = (noise_of(there, ahead, step.next_alpha, step.next_sigma) - eps) / 2
                ahead = ahead + step.next_alpha * (step.next_noise_level - step.noise_level) * slope
            x = ahead
        return x
