"""Unified predictor-corrector sampling: higher order at one call a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.samplers.dpm_solver import log_step
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Spacing, Step
from ldm.rng import Noise
from ldm.types import Denoise


class UniPC(Sampler):
    """UniPC with data prediction and B(h) = e^h - 1: Zhao et al. 2023 (arXiv:2302.04867), Algorithms 5 to 8.

    The estimate that the next step needs anyway also corrects the step before it. The order grows from 1 at
    the start and falls to 1 at the end; a step from pure noise, infinite in log SNR, leaves no past.

    Args:
        num_steps: Calls of the denoiser.
        order: p >= 1; 2 with guidance, 3 without, say the authors.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 20, order: int = 2, spacing: Spacing | None = None) -> None:
        if order < 1:
            raise ValueError(f"sampler.order must be >= 1, got {order}")
        super().__init__(num_steps, spacing)
        self.order = order

    def __call__(
        self, denoise: Denoise, steps: Sequence[Step], x: Tensor, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Predict with the past estimates; correct with the new one."""
        x = start = x.float()
        past: list[tuple[float, Tensor]] = []  # (ln(alpha / sigma), x0_hat), newest first
        used, before = 0, steps[0]
        for i, step in enumerate(steps):
            x0 = denoise(x, step.timesteps(x)).float()
            if i > 0:
                x = _update(before, start, past[:used], x0)
            past = [(-math.log(step.noise_level) if step.alpha else -math.inf, x0), *past[: self.order - 1]]
            finite = sum(math.isfinite(level) for level, _ in past)
            used, before, start = max(1, min(finite, len(steps) - i)), step, x
            x = _update(step, x, past[:used], None)
        return x


def _update(step: Step, x: Tensor, past: Sequence[tuple[float, Tensor]], there: Tensor | None) -> Tensor:
    """Step with the estimates ``past``; correct the step with ``there``, the one after it (Eq. 3 and 9)."""
    h, (level, x0) = log_step(step), past[0]
    kept = step.next_sigma / step.sigma
    growth = step.next_alpha - kept * step.alpha  # alpha_t (1 - e^-h)
    nodes = [(other - level) / h for other, _ in past[1:]]
    slopes = [(estimate - x0) / node for (_, estimate), node in zip(past[1:], nodes, strict=True)]
    if there is not None:
        nodes, slopes = [*nodes, 1.0], [*slopes, there - x0]
    weights = _weights(nodes, h)
    return kept * x + growth * (x0 + sum(w * slope for w, slope in zip(weights, slopes, strict=True)))


def _weights(nodes: Sequence[float], h: float) -> list[float]:
    """Solve sum_m weight_m node_m**(k - 1) = k! phi_k / phi_0 for k = 1 .. number of nodes (Eq. 6 and 11).

    Here phi_0 = e^-h - 1 and phi_k = -phi_{k-1} / h - 1 / k!. A single node has weight 1 / 2, which is as
    good at this order.
    """
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    phi, right = math.expm1(-h), []
    for k in range(1, len(nodes) + 1):
        phi = -phi / h - 1 / math.factorial(k)
        right.append(phi * math.factorial(k) / math.expm1(-h))
    powers = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    solved: list[float] = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
    return solved
