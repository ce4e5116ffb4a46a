"""Input and output of the network, and x0_hat from them.

Letters: x_t = alpha x0 + sigma eps, on any schedule; sigma / alpha is the noise level. Given x_t, each of x0,
eps, v and u fixes the others, so the choice only changes how errors are weighted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ldm.io.config import Configurable


class Prediction(Configurable, ABC):
    """A parametrisation: what goes into the network, raw output <-> x0_hat, and the training target.

    In all methods ``alpha`` in [0, 1] and ``sigma`` >= 0, (B, 1, 1, 1), broadcast over the others,
    (B, C, h, w).
    """

    needs_signal: ClassVar[bool] = False
    """Whether x0 cannot be recovered where alpha = 0."""

    def input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return what goes into the network: x_t itself, unless a prediction scales it."""
        return x_t

    def time(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise level as the network gets it, (B,): the timesteps ``t`` by default."""
        return t

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
    """The noise: Ho et al. 2020 (arXiv:2006.11239), Eq. 14. x0 cannot be recovered where alpha = 0."""

    needs_signal = True

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


class X0(Prediction):
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


class EDM(Prediction):
    """Preconditioning: Karras et al. 2022 (arXiv:2206.00364), Eq. 7, with the coefficients of Table 1.

    x0_hat = c_skip x + c_out F(c_in x; c_noise) with x = x_t / alpha = x0 + s eps, at the noise level s =
    sigma / alpha. Input and target of F have unit variance at every level, and c_out, the factor on errors of
    F, is as small as it can be (app. B.6). Where variance is preserved and ``sigma_data`` is 1, F is -v. The
    paper weighs the error of x0_hat by 1 / c_out**2: that is weight 1 on F, ``weighting.Uniform``.

    Args:
        sigma_data: Standard deviation of x0, > 0: 0.5 for images in [-1, 1], 1 for scaled latents.
    """

    needs_signal = True

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"objective.prediction.sigma_data must be > 0, got {sigma_data}")
        self.sigma_data = sigma_data

    def c_skip(self, level: Tensor) -> Tensor:
        """Return sigma_data**2 / (s**2 + sigma_data**2), from 1 at s = 0 to 0; ``level`` has any shape."""
        return self.sigma_data**2 / (level.square() + self.sigma_data**2)

    def c_out(self, level: Tensor) -> Tensor:
        """Return s sigma_data / sqrt(s**2 + sigma_data**2), from 0 at s = 0 to sigma_data."""
        return level * self.sigma_data * self.c_in(level)

    def c_in(self, level: Tensor) -> Tensor:
        """Return 1 / sqrt(s**2 + sigma_data**2), from 1 / sigma_data at s = 0 to 0."""
        return 1 / (level.square() + self.sigma_data**2).sqrt()

    def c_noise(self, level: Tensor) -> Tensor:
        """Return ln(s) / 4, from -1.55 to 1.1 over the levels of ``VarianceExploding``."""
        return level.log() / 4

    def input(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c_in x_t / alpha."""
        return self.c_in(sigma / alpha) * (x_t / alpha)

    def time(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c_noise, (B,), whatever the timesteps of the schedule are."""
        return self.c_noise(sigma / alpha).flatten()

    def x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat = c_skip x_t / alpha + c_out F (Eq. 7)."""
        level = sigma / alpha
        return self.c_skip(level) * (x_t / alpha) + self.c_out(level) * output

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """F = (x0 - c_skip (x0 + s eps)) / c_out (Eq. 8), which is c_in (s x0 / sigma_data - sigma_data eps).

        The second form does not subtract next to equal numbers where s is small.
        """
        level = sigma / alpha
        return self.c_in(level) * (level / self.sigma_data * x0 - self.sigma_data * noise)

    def error_ratio(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """1 / c_out**2."""
        return self.c_out(sigma / alpha) ** -2


def noise_of(x0: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return the noise that leads from x0 to x_t: eps = (x_t - alpha x0) / sigma.

    Args:
        x0: (B, C, h, w), often an estimate.
        x_t: Same shape.
        alpha: Broadcasts over ``x0``, in [0, 1].
        sigma: The same in (0, 1]; where it is 0 there is no noise to find.
    """
    return (x_t - alpha * x0) / sigma
