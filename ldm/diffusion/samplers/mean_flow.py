"""Sampling with average velocities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import noise_of
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class MeanFlowSampler(Sampler):
    """Steps along average velocities, z_r = z_t - (t - r) u: Geng et al. 2025 (arXiv:2505.13447).

    For models that were trained with ``MeanFlow``.

    Args:
        num_steps: Calls of the denoiser; 1 goes from noise to a sample at once.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    times = 2

    def __init__(self, num_steps: int = 1, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Go to each next level along the line through x and the estimate over the whole step."""
        x = x.float()
        for step in steps:
            times = torch.stack([step.timesteps(x).float(), step.next_times(x).float()], 1)
            x0 = denoise(x, times).float()
            x = step.next_alpha * x0 + step.next_sigma * noise_of(x0, x, step.alpha, step.sigma)
        return x
