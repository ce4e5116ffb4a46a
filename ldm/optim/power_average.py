"""Averages with power-function profiles, and any length of them afterwards.

Karras et al. 2024 (arXiv:2312.02696), section 3 and its appendix. An average at time T weighs the weights of
time t in [0, T] by p(t) = (gamma + 1) / T (t / T)^gamma. Its length is the standard deviation of p in units
of T, ``sigma_rel``: 0.10 looks back over a tenth of training, however long that is.

Times are optimizer steps. Between two steps the weights are constant, so what ``decay`` tracks step by step
is the integral over p exactly: those of step k count by (k / T)^(gamma + 1) - ((k - 1) / T)^(gamma + 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LONGEST = 1 / math.sqrt(12)
"""Length of a plain mean over all of training (gamma = 0)."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Profile:
    """Weights of an average of what training passed through.

    Args:
        sigma_rel: Standard deviation of the profile in units of ``time``, in (0, 0.288].
        time: Steps averaged over, at least 1.
    """

    sigma_rel: float
    time: int

    @property
    def gamma(self) -> float:
        """Exponent of the power function."""
        return exponent(self.sigma_rel)


@lru_cache(maxsize=128)
def exponent(sigma_rel: float) -> float:
    """Return gamma of a length, by Algorithm 2 of the paper.

    It is the largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Args:
        sigma_rel: In (0, 0.288]; smaller ones forget faster.

    Raises:
        ValueError: If it is not.
    """
    if not 0.0 < sigma_rel < LONGEST:
        raise ValueError(f"sigma_rel: got {sigma_rel}, expected a length in (0, 0.288]")
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def decay(gamma: float, time: int) -> float:
    """Return the weight of the past at step ``time``, counted from 1: Eq. 127; 0 at the first."""
    return float((1.0 - 1.0 / time) ** (gamma + 1.0))


def reconstruction(stored: Sequence[Profile], wanted: Profile) -> tuple[Array, float]:
    """Make up a wanted average of stored ones: Algorithm 3, least squares of profiles.

    Args:
        stored: N averages, all different.
        wanted: Best not after the last of them: nothing stored has seen later weights.

    Returns:
        How much of each, (N,), with sum 1: weights that did not change in training stay as they are. And how
        far the profile is from the wanted one: norm of the difference by norm of the wanted, 0 is exact.
    """
    gram = np.array([[_product(a, b) for b in stored] for a in stored])
    target = np.array([_product(a, wanted) for a in stored])
    # of unit length: early averages have far larger products than late ones
    scale = 1.0 / np.sqrt(np.diag(gram))
    parts: Array = scale * np.linalg.solve(gram * np.outer(scale, scale), target * scale)
    parts = parts / parts.sum()
    square = _product(wanted, wanted)
    difference = square - 2.0 * parts @ target + parts @ gram @ parts
    return parts, math.sqrt(max(0.0, float(difference)) / square)


def _product(a: Profile, b: Profile) -> float:
    """Integrate the product of two profiles: Eq. 151."""
    early, late = sorted((a, b), key=lambda profile: profile.time)
    height = (a.gamma + 1.0) * (b.gamma + 1.0) / ((a.gamma + b.gamma + 1.0) * late.time)
    return float(height * (early.time / late.time) ** late.gamma)
