"""Pseudo linear multistep sampling: the sampler of the latent-diffusion paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.prediction import noise_of
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.diffusion.schedule import Schedule
from ldm.rng import Noise
from ldm.types import Denoise

WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Adams-Bashforth: weights of the newest slope and those before it, for 1 to 4 of them."""


class PLMS(Sampler):
    """DDIM's step along an extrapolated noise: Liu et al. 2022 (arXiv:2202.09778), Eq. 12.

    The first step, which has no past, takes the mean of the noise at both its ends, as Rombach et al. 2021
    do: one more call. A step from next to pure noise is plain DDIM and leaves no past, because what is wrong
    in the extrapolated noise is multiplied by alpha_s / alpha_t.

    Args:
        num_steps: Steps; the denoiser is called once in each, and once more.
        spacing: Which timesteps, equally far apart; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 50, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, spacing)

    def steps(self, schedule: Schedule) -> list[Step]:
        """List the steps of the trajectory.

        Raises:
            ValueError: If they are not equally long, but for rounding to a timestep.
        """
        steps = super().steps(schedule)
        lengths = [step.t - step.next_t for step in steps[:-1]]
        if lengths and max(lengths) - min(lengths) > 1 + 1e-6:
            raise ValueError(
                f"sampler: PLMS got steps of {min(lengths):.4g} to {max(lengths):.4g} timesteps by spacing "
                f"{type(self.spacing).__name__}, expected equal ones: Leading, Trailing or Linspace"
            )
        return steps

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Step to alpha_s / alpha_t (x - sigma_t eps') + sigma_s eps' (Eq. 11), eps' being extrapolated."""
        x = x.float()
        past: list[Tensor] = []
        for step in steps:
            x0 = denoise(x, step.timesteps(x)).float()
            eps = noise_of(x0, x, step.alpha, step.sigma)
            ddim = step.next_alpha * x0 + step.next_sigma * eps
            if step.from_noise:
                x = ddim
                continue
            past = [eps, *past[:3]]
            slope = sum(w * e for w, e in zip(WEIGHTS[len(past) - 1], past, strict=True))
            if len(past) == 1 and step.next_sigma > 0.0:
                there = denoise(ddim, step.next_times(x)).float()
                slope = (eps + noise_of(there, ddim, step.next_alpha, step.next_sigma)) / 2
            # Eq. 11 less what it gives for eps itself, so that only the difference is multiplied
            x = ddim + step.next_alpha * (step.next_noise_level - step.noise_level) * (slope - eps)
        return x
