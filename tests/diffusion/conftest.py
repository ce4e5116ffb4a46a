"""A data distribution whose best denoiser is known: N(mean, std**2), independently in every entry."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Gaussian:
    mean: float = 0.7
    std: float = 0.4

    def denoiser(self, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t] = mean + std**2 alpha / (alpha**2 std**2 + sigma**2) (x_t - alpha mean)."""

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (
                table[t].view(-1, *[1] * (x_t.ndim - 1)) for table in (schedule.alpha, schedule.sigma)
            )
            gain = self.std**2 * alpha / (alpha**2 * self.std**2 + sigma**2)
            return (self.mean + gain * (x_t.double() - alpha * self.mean)).to(x_t.dtype)

        return denoise


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
