"""Guidance: combine a conditional and an unconditional estimate of x0 into one.

For a fixed x_t, eps_hat and v_hat are affine in x0_hat, and guidance takes combinations whose weights sum
to 1. So it makes no difference whether they are taken of eps_hat, as in the papers, or of x0_hat, as here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from ldm.types import Denoise


class Guidance(ABC):
    """Makes one denoiser of two."""

    @abstractmethod
    def __call__(self, cond: Denoise, uncond: Denoise) -> Denoise:
        """Combine.

        Args:
            cond: Estimate of x0 given the condition.
            uncond: The same given the null condition.
        """


class Unguided(Guidance):
    """The conditional estimate as it is."""

    def __call__(self, cond: Denoise, uncond: Denoise) -> Denoise:
        """Return ``cond``; ``uncond`` is never evaluated."""
        return cond


class ClassifierFree(Guidance):
    """Classifier-free guidance: Ho & Salimans 2022 (arXiv:2207.12598), Eq. 6, with scale = 1 + w.

    x0_hat = uncond + scale (cond - uncond).

    Args:
        scale: 0 ignores the condition, 1 samples the conditional model, more trades diversity for
            agreement with the condition. At 0 and 1 only one of the two is evaluated.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, cond: Denoise, uncond: Denoise) -> Denoise:
        """Extrapolate from ``uncond`` through ``cond``."""
        if self.scale == 1.0:
            return cond
        if self.scale == 0.0:
            return uncond

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            base = uncond(x_t, t)
            return base + self.scale * (cond(x_t, t) - base)

        return guided


def clamped(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Keep x0_hat in the range of the data: for pixels, which have one.

    Args:
        denoise: What to clamp; put guidance inside, since it overshoots.
        low: Smallest value of the data.
        high: Largest value of the data.
    """
    return lambda x_t, t: denoise(x_t, t).clamp(low, high)
