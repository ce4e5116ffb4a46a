"""Distributions of training timesteps: integers, or fractional ones for continuous noise levels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.io.config import Configurable

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, fill [0, 1) more evenly than those of any other number."""


class TimestepDistribution(Configurable, ABC):
    """A distribution of training timesteps: 0 is almost clean, T - 1 almost noise."""

    @abstractmethod
    def quantile(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Map uniform numbers to timesteps: the inverse of the CDF.

        So the timestep of a sample is a function of the sample's own random number.

        Args:
            uniform: (B,) float64 in [0, 1).
            schedule: What timesteps there are.

        Returns:
            (B,) in [0, T - 1]: int64, or float64 if they are fractional.
        """

    def even(self, uniform: Tensor, position: Tensor | None) -> Tensor:
        """Choose the uniform numbers to use.

        Args:
            uniform: (B,) float64 in [0, 1), independent.
            position: (B,) int64, positions of the samples in the training stream, or None.

        Returns:
            (B,) float64 in [0, 1).
        """
        return uniform


class UniformTimesteps(TimestepDistribution):
    """Every timestep equally often: Ho et al. 2020 (arXiv:2006.11239), Algorithm 1."""

    def quantile(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Return floor(T u)."""
        return (uniform * schedule.num_steps).long()


class LogitNormal(TimestepDistribution):
    """Timesteps t whose logit of t / T is normal: Esser et al. 2024 (arXiv:2403.03206), Section 3.1.

    Args:
        mean: Of the logit; below 0 visits clean timesteps more often.
        std: Of the logit, > 0; small ones stay in the middle.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise ValueError(f"objective.timesteps.std must be > 0, got {std}")
        self.mean = mean
        self.std = std

    def quantile(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Return floor(T sigmoid(mean + std z)) with the normal quantile z."""
        logit = self.mean + self.std * torch.special.ndtri(uniform)
        time = torch.sigmoid(logit).clamp(max=1 - 1e-12)  # which is 1 from a logit of 37 on
        return (time * schedule.num_steps).long()


class LogNormal(TimestepDistribution):
    """Noise levels whose log is normal: Karras et al. 2022 (arXiv:2206.00364), Table 1.

    ln(sigma / alpha) ~ N(mean, std**2). Levels are continuous: timesteps are fractional, on any
    schedule. Those beyond its ends are taken to them: 1 in 50,000 with the defaults on ``VarianceExploding``.

    Args:
        mean: P_mean, of the log. The default is the paper's, for a standard deviation of x0 of 0.5; where
            that is 1, as in scaled latents, ln 2 = 0.69 more is the same ratio of noise to signal.
        std: P_std, of the log, > 0.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if std <= 0:
            raise ValueError(f"objective.timesteps.std must be > 0, got {std}")
        self.mean = mean
        self.std = std

    def quantile(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Find the timesteps of exp(mean + std z) with the normal quantile z."""
        return schedule.timesteps((self.mean + self.std * torch.special.ndtri(uniform)).exp())


class LowDiscrepancy(TimestepDistribution):
    """Another distribution, visited evenly by each batch: less noise in the loss and its gradient.

    Kingma et al. 2021 (arXiv:2107.00630), app. I.1 space the timesteps of a batch evenly. Here the sample at
    position p of the stream takes frac(p * golden ratio), an even sequence over every stretch of the stream;
    so the timesteps depend neither on the batch size nor on the number of processes. Outside of training
    they are independent.

    Args:
        of: The distribution.
    """

    def __init__(self, of: TimestepDistribution | None = None) -> None:
        self.of = of or UniformTimesteps()

    def quantile(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """Return that of the distribution."""
        return self.of.quantile(uniform, schedule)

    def even(self, uniform: Tensor, position: Tensor | None) -> Tensor:
        """Return frac(p * golden ratio)."""
        return uniform if position is None else (position.double() * GOLDEN_RATIO) % 1.0
