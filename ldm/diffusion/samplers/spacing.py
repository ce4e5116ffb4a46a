"""The timesteps that a sampler visits, and the noise levels there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.io.config import Configurable


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from timestep t to a less noisy one, with coefficients in float64."""

    t: int | float
    """Timestep at which the denoiser is evaluated; between two trained ones if it is a float."""
    alpha: float
    sigma: float
    next_t: int | float
    """After the step; -1 after the last one."""
    next_alpha: float
    """After the step; 1 after the last one."""
    next_sigma: float
    """After the step; 0 after the last one."""

    @property
    def noise_level(self) -> float:
        """Ratio sigma / alpha before the step; infinite where nothing of x0 is left."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def from_noise(self) -> bool:
        """Whether less than a thousandth of x0 is left before the step.

        Then the noise level is infinite, or so large (20000 at the end of ``Cosine``) that whatever is wrong
        in a slope over it outweighs the sample: methods that combine such slopes begin after it.
        """
        return self.alpha < 1e-3

    @property
    def start_std(self) -> float:
        """Standard deviation of the noise to start with, where nothing is known of x0: 1, or sigma above 1.

        A schedule that preserves variance ends in x_t of the variance of x0, which is 1; where the variance
        explodes, sigma is all that counts (Karras et al. 2022, arXiv:2206.00364, Algorithm 1).
        """
        return max(1.0, self.sigma)

    @property
    def next_noise_level(self) -> float:
        """Noise level after the step."""
        return self.next_sigma / self.next_alpha

    def timesteps(self, x: Tensor) -> Tensor:
        """Return t for each row of ``x``: (B,) on its device, int64, or float32 between timesteps."""
        return _times(self.t, x)

    def next_times(self, x: Tensor) -> Tensor:
        """Return the timestep after the step for each row of ``x``, (B,)."""
        return _times(self.next_t, x)


def _times(t: int | float, x: Tensor) -> Tensor:
    dtype = torch.int64 if isinstance(t, int) else torch.float32
    return torch.full((len(x),), t, dtype=dtype, device=x.device)


class Spacing(Configurable, ABC):
    """Selects the timesteps of a trajectory from noise to clean."""

    @abstractmethod
    def timesteps(self, schedule: Schedule, count: int) -> Tensor:
        """Select ``count`` timesteps.

        Returns:
            (count,) falling, within [0, T - 1]: int64, or float64 if they lie between trained ones.
        """


class Trailing(Spacing):
    """Equal steps that begin at T - 1 and end at clean: Lin et al. 2023 (arXiv:2305.08891), Table 2.

    The step to alpha = 1, sigma = 0 is as long as the others. Evaluating 0 as well would leave a
    second-order sampler a jump in log SNR several times the one before, over which it overshoots.
    """

    def timesteps(self, schedule: Schedule, count: int) -> Tensor:
        """Round T, T - T / count, ... and subtract 1."""
        spaced = torch.linspace(schedule.num_steps, 0, count + 1, dtype=torch.float64)[:-1]
        return spaced.round().long() - 1


class Leading(Spacing):
    """Every (T // count)-th timestep from the clean end: Song et al. 2020 (arXiv:2010.02502), app. D.2.

    What Stable Diffusion 1.x and 2.x are usually sampled with. It never evaluates T - 1, so it is wrong for a
    schedule that ends in pure noise.

    Args:
        offset: Added to every timestep; 1 in Stable Diffusion.
    """

    def __init__(self, offset: int = 1) -> None:
        if offset < 0:
            raise ValueError(f"sampler.spacing.offset must be >= 0, got {offset}")
        self.offset = offset

    def timesteps(self, schedule: Schedule, count: int) -> Tensor:
        """Return offset, offset + T // count, ... falling; the offset shrinks where T has no room."""
        spaced = torch.arange(count - 1, -1, -1) * (schedule.num_steps // count)
        return spaced + min(self.offset, schedule.num_steps - 1 - int(spaced[0]))


class Linspace(Spacing):
    """Equal steps from T - 1 to 0, ends included: Nichol & Dhariwal 2021 (arXiv:2102.09672), Section 4."""

    def timesteps(self, schedule: Schedule, count: int) -> Tensor:
        """Round to trained timesteps."""
        return torch.linspace(schedule.num_steps - 1, 0, count, dtype=torch.float64).round().long()


class Karras(Spacing):
    """Noise levels that crowd at the clean end: Karras et al. 2022 (arXiv:2206.00364), Eq. 5.

    l_i = (l_max**(1/rho) + i / (n - 1) (l_min**(1/rho) - l_max**(1/rho)))**rho for the noise level l, between
    those of T - 1 and 0. The timesteps are fractional.

    Args:
        rho: The exponent; larger ones spend more steps near clean.
    """

    def __init__(self, rho: float = 7.0) -> None:
        self.rho = rho

    def timesteps(self, schedule: Schedule, count: int) -> Tensor:
        """Find the timesteps of the levels.

        Raises:
            ValueError: If the schedule ends in pure noise, whose level is infinite.
        """
        if schedule.alpha[-1] == 0:
            raise ValueError(
                f"sampler.spacing: Karras needs a largest noise level, but {type(schedule).__name__} ends in "
                "pure noise: expected Trailing"
            )
        if count == 1:  # of a table of one, too, where there is nothing to lie between
            return torch.tensor([schedule.num_steps - 1.0], dtype=torch.float64)
        ends = schedule.noise_level[[-1, 0]] ** (1 / self.rho)
        spaced = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, count, dtype=torch.float64))
        return schedule.timesteps(spaced**self.rho)


def trajectory(schedule: Schedule, spacing: Spacing, num_steps: int | None) -> list[Step]:
    """List the steps from noise to clean.

    Args:
        schedule: T timesteps.
        spacing: Selects them.
        num_steps: Steps, in [1, T]; None visits all T. One step evaluates the noisiest alone.

    Raises:
        ValueError: If ``num_steps`` is not in [1, T].
    """
    count = schedule.num_steps if num_steps is None else num_steps
    if not 1 <= count <= schedule.num_steps:
        raise ValueError(
            f"sampler.num_steps must be in [1, {schedule.num_steps}] for this schedule, got {count}"
        )
    timesteps = spacing.timesteps(schedule, count)
    alpha, sigma = schedule.levels(timesteps)
    points = list(zip([*timesteps.tolist(), -1], [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0], strict=True))
    return [Step(*here, *there) for here, there in pairwise(points)]
