"""What every sampler is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.noise import Noise
from ldm.diffusion.schedule import Schedule
from ldm.types import Denoise


class Sampler(ABC):
    """Walks from pure noise to a sample. It sees x0_hat only, so it works for any prediction."""

    @abstractmethod
    def __call__(
        self, denoise: Denoise, schedule: Schedule, x_T: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Draw samples.

        Args:
            denoise: Estimate of x0, guidance included.
            schedule: The schedule that it was trained with.
            x_T: Standard normal, (B, C, h, w).
            noise: Where further noise comes from; deterministic samplers draw none.

        Returns:
            x0, (B, C, h, w) float32.
        """
