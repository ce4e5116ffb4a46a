"""Interface of a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.samplers.spacing import Spacing, Step, Trailing, trajectory
from ldm.diffusion.schedule import Schedule
from ldm.io.config import Configurable
from ldm.rng import Noise
from ldm.types import Denoise


class Sampler(Configurable, ABC):
    """Goes from noise to a sample, by x0_hat alone: so it works with any prediction and any schedule.

    Args:
        num_steps: Steps of the trajectory; None takes all timesteps of the schedule.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    times: ClassVar[int] = 1
    """Times that it gives the denoiser: 2 asks for an estimate over the whole step."""

    def __init__(self, num_steps: int | None, spacing: Spacing | None = None) -> None:
        self.num_steps = num_steps
        self.spacing = spacing or Trailing()

    def steps(self, schedule: Schedule) -> list[Step]:
        """List the steps of the trajectory on the schedule that the denoiser was trained with."""
        return trajectory(schedule, self.spacing, self.num_steps)

    def estimator(self, objective: Objective) -> Callable[[Network], Denoise]:
        """Return what turns the raw network into the estimates that it takes: of x0 unless overridden."""
        return objective.denoiser

    @abstractmethod
    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Draw samples.

        Args:
            denoise: Estimate of x0, guidance included.
            steps: The trajectory; if it is cut, ``x`` is an image with noise of the first level left.
            x: x_t at the level of the first step, (B, C, h, w): for a full trajectory, noise
                of standard deviation ``steps[0].start_std``.
            noise: Where further noise comes from; deterministic samplers draw none.

        Returns:
            x0, (B, C, h, w) float32.
        """
