"""The timesteps that a sampler visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from timestep t to a less noisy one, with coefficients in float64."""

    t: int
    """Timestep that the denoiser is asked at."""
    alpha: float
    sigma: float
    next_alpha: float
    """After the step; 1 after the last one."""
    next_sigma: float
    """After the step; 0 after the last one."""

    def times(self, x: Tensor) -> Tensor:
        """Return t for each row of ``x``: (B,) int64 on its device."""
        return torch.full((len(x),), self.t, dtype=torch.int64, device=x.device)


def steps(schedule: Schedule, num_steps: int | None = None) -> list[Step]:
    """Space ``num_steps`` timesteps evenly over {T - 1, ..., 0, clean}, from T - 1 on, clean last.

    The steps are equal in t, the one to alpha = 1, sigma = 0 too: Lin et al. 2023 (arXiv:2305.08891),
    Table 2, "trailing". To ask at 0 as well would leave a second-order sampler a jump in log SNR
    several times the one before, over which it overshoots.

    Args:
        schedule: T timesteps.
        num_steps: Calls of the denoiser, in [1, T]; None visits all T. One step asks at T - 1 alone.

    Raises:
        ValueError: If ``num_steps`` is not in [1, T].
    """
    count = schedule.num_steps if num_steps is None else num_steps
    if not 1 <= count <= schedule.num_steps:
        raise ValueError(
            f"sampler.num_steps must be in [1, {schedule.num_steps}] for this schedule, got {count}"
        )
    times = torch.linspace(schedule.num_steps, 0, count + 1, dtype=torch.float64)[:-1].round().long() - 1
    alpha = [*schedule.alpha[times].tolist(), 1.0]
    sigma = [*schedule.sigma[times].tolist(), 0.0]
    return [
        Step(t, *pair) for t, *pair in zip(times.tolist(), alpha, sigma, alpha[1:], sigma[1:], strict=False)
    ]
