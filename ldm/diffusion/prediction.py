"""What the network predicts, and how to read x0_hat from it.

Letters: x_t = alpha x0 + sigma eps, on any schedule. Given x_t, each of x0, eps, v and u fixes the
others, so the choice only changes how errors are weighted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Prediction(ABC):
    """A parametrisation: raw output <-> x0_hat, and the training target.

    In all methods ``alpha`` and ``sigma``, (B, 1, 1, 1) in [0, 1], broadcast over the others, (B, C, h, w).
    """

    @abstractmethod
    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Turn the raw output into x0_hat."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what the raw output should be."""

    @abstractmethod
    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return ||error of the raw output||**2 / ||error of x0_hat||**2; here any shape, sigma > 0."""


class Epsilon(Prediction):
    """The noise: Ho et al. 2020 (arXiv:2006.11239), Eq. 14. Says nothing about x0 where alpha = 0."""

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat = (x_t - sigma eps_hat) / alpha (Ho et al. 2020, Eq. 15)."""
        return (x_t - sigma * output) / alpha

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Eps itself."""
        return noise

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """SNR: an error in eps counts for much of x0 when noise dominates."""
        return (alpha / sigma).square()


class Velocity(Prediction):
    """v = alpha eps - sigma x0: Salimans & Ho 2022 (arXiv:2202.00512), app. D. Sound at every SNR.

    There alpha**2 + sigma**2 = 1; the sum is kept here, so that other schedules have it too.
    """

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat = (alpha x_t - sigma v_hat) / (alpha**2 + sigma**2)."""
        return (alpha * x_t - sigma * output) / (alpha.square() + sigma.square())

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """V = alpha eps - sigma x0."""
        return alpha * noise - sigma * x0

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(alpha**2 + sigma**2)**2 / sigma**2, which is SNR + 1 where variance is preserved."""
        return ((alpha.square() + sigma.square()) / sigma).square()


class Flow(Prediction):
    """u = eps - x0, the velocity of a straight line: Liu et al. 2022 (arXiv:2209.03003), Eq. 1.

    Sound at every SNR.
    """

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat = (x_t - sigma u_hat) / (alpha + sigma), where alpha + sigma = 1 on the line."""
        return (x_t - sigma * output) / (alpha + sigma)

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """U = eps - x0."""
        return noise - x0

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(alpha + sigma)**2 / sigma**2."""
        return ((alpha + sigma) / sigma).square()


class Sample(Prediction):
    """The clean sample x0 itself."""

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output as it is."""
        return output

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0 itself."""
        return x0

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(alpha)


def noise_of(x0: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return the noise that leads from x0 to x_t: eps = (x_t - alpha x0) / sigma.

    Args:
        x0: (B, C, h, w), often an estimate.
        x_t: Same shape.
        alpha: Broadcasts over ``x0``, in [0, 1].
        sigma: The same in (0, 1]; where it is 0 there is no noise to find.
    """
    return (x_t - alpha * x0) / sigma
