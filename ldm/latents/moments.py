"""Moments of latents per channel: their scale, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 0.01
"""A channel is dead if less of its variance comes from the image; of a prior's 1: Burda et al. 2015."""


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of z ~ q(z | image) over images and positions, (C,) float64 each.

    Attributes:
        mean: E[z].
        std: Standard deviation of z.
        kurtosis: E[(z - mean)^4] / std^4; 3 of a normal distribution.
        informative: Share of the variance that comes from the image, Var(mu) / Var(z): 0 of a channel
            whose posterior is the prior.
    """

    mean: Tensor
    std: Tensor
    kurtosis: Tensor
    informative: Tensor

    def summary(self) -> dict[str, float]:
        """Return what a curve shows of all channels: the extremes, and the share of dead ones."""
        return {
            "latent_mean_max": float(self.mean.abs().max()),
            "latent_std_min": float(self.std.min()),
            "latent_std_max": float(self.std.max()),
            "latent_kurtosis_max": float(self.kurtosis.max()),
            "dead_channels": float((self.informative < DEAD).double().mean()),
        }


class LatentMoments:
    """Float64 sums over images and positions, exactly of z ~ q(z | image) rather than of one draw.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._sums = torch.zeros(5, channels, dtype=torch.float64)
        self.count = 0

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Add the posteriors of B images: mean and standard deviation, (B, C, h, w)."""
        mu, variance = mean.cpu().double(), std.cpu().double().square()
        square = mu.square()
        # E z^n of a normal distribution; the last is E mu^2
        powers = (
            mu,
            square + variance,
            mu * (square + 3.0 * variance),
            square.square() + variance * (6.0 * square + 3.0 * variance),
            square,
        )
        self._sums += torch.stack([power.sum((0, 2, 3)) for power in powers])
        self.count += mean[:, 0].numel()

    def packed(self) -> Tensor:
        """Return all sums as one vector, to be added up over processes."""
        return torch.cat([self._sums.flatten(), torch.tensor([float(self.count)], dtype=torch.float64)])

    def reset(self) -> None:
        """Forget all images."""
        self._sums.zero_()
        self.count = 0


def statistics(packed: Tensor) -> LatentStatistics:
    """Compute statistics from what ``LatentMoments.packed`` returned, summed over processes."""
    first, second, third, fourth, between = (packed[:-1] / packed[-1]).view(5, -1)
    variance = (second - first.square()).clamp_min(1e-12)
    central = fourth - 4.0 * first * third + 6.0 * first.square() * second - 3.0 * first.pow(4)
    informative = (between - first.square()).clamp_min(0.0) / variance
    return LatentStatistics(first, variance.sqrt(), central / variance.square(), informative)
