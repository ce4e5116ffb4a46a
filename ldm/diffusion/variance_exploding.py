"""The noise schedule of EDM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule


class VarianceExploding(Schedule):
    """alpha = 1, noise is added and nothing taken away: Karras et al. 2022 (arXiv:2206.00364), Table 1.

    ln sigma is linear in t, which is continuous: it may be floating, as with ``timesteps.LogNormal`` in
    training and ``Karras`` in sampling. The defaults are the paper's, for images in [-1, 1].

    Args:
        num_steps: T >= 2; validation and most spacings use integer timesteps.
        sigma_min: Noise level of timestep 0, > 0.
        sigma_max: Noise level of timestep T - 1; a trajectory starts with noise of this standard deviation.
    """

    def __init__(self, num_steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if num_steps < 2 or not 0 < sigma_min < sigma_max:
            raise ValueError(
                "schedule: expected num_steps >= 2 and 0 < sigma_min < sigma_max, got "
                f"{num_steps}, {sigma_min} and {sigma_max}"
            )
        first, last = math.log(sigma_min), math.log(sigma_max)
        sigma = torch.linspace(first, last, num_steps, dtype=torch.float64).exp()
        super().__init__(torch.ones_like(sigma), sigma)

    def split(self, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha = 1 and sigma = ``noise_level``."""
        return torch.ones_like(noise_level), noise_level
