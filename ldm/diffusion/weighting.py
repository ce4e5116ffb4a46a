"""Weight of each timestep in the loss.

Most weightings are a function w_t on the squared error of x0_hat, stated once and converted to the equivalent
weight on the error of whatever the network predicts: w_t ||error of x0_hat||**2 / ||error of the output||**2.
SNR_t = alpha_t**2 / sigma_t**2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.io.config import Configurable

_LEAST = 1e-8  # stands for alpha or sigma of 0: ratios have their limits there to 15 digits, and no 0 / 0


class Weighting(Configurable, ABC):
    """Weights of the squared error, as tables over timesteps in float64."""

    @abstractmethod
    def __call__(self, schedule: Schedule, prediction: Prediction) -> Tensor:
        """Weigh the squared error of ``prediction``'s raw output at each timestep.

        Returns:
            (T,) float64, finite and >= 0; its limit where the SNR is 0 or infinite.
        """


class Uniform(Weighting):
    """Weight 1 on the prediction's own target, whatever that is in the space of x0."""

    def __call__(self, schedule: Schedule, prediction: Prediction) -> Tensor:
        """Return ones."""
        return torch.ones_like(schedule.alpha)


class X0Weighting(Weighting):
    """A weighting defined on the error of x0_hat, equivalent for every prediction."""

    @abstractmethod
    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Weigh the squared error of x0_hat.

        Args:
            alpha: (T,) float64, falling, > 0.
            sigma: (T,) float64, rising, > 0.

        Returns:
            (T,) float64, >= 0.
        """

    def __call__(self, schedule: Schedule, prediction: Prediction) -> Tensor:
        """Divide by what an error of x0_hat makes of one of the raw output."""
        alpha, sigma = schedule.alpha.clamp_min(_LEAST), schedule.sigma.clamp_min(_LEAST)
        return self.x0(alpha, sigma) / prediction.error_ratio(alpha, sigma)


class Simple(X0Weighting):
    """L_simple, weight 1 on the error of the noise: Ho et al. 2020 (arXiv:2006.11239), Eq. 14."""

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return SNR: an error of x0_hat is one of eps_hat times sigma / alpha."""
        return _snr(alpha, sigma)


class VariationalBound(X0Weighting):
    """The bound on the likelihood: Ho et al. 2020 (arXiv:2006.11239), Eq. 12, with the variance beta-tilde.

    On the error of x0_hat that is (SNR_{t-1} - SNR_t) / 2 (Kingma et al. 2021, arXiv:2107.00630, Eq. 14). t =
    0 is the decoder, here N(x0; x0_hat, sigma_0**2), with weight 1 / (2 sigma_0**2). So T times the mean loss
    is the bound in nats per dimension, but for what does not depend on the network.
    """

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return half the falls of the SNR, after half the precision of the decoder."""
        return torch.cat([sigma[:1] ** -2, -_snr(alpha, sigma).diff()]) / 2


class MinSNR(X0Weighting):
    """min(SNR, gamma) on the error of x0_hat: Hang et al. 2023 (arXiv:2303.09556), Section 3.4.

    On the raw output this is min(1, gamma / SNR) for epsilon, min(SNR, gamma) / (SNR + 1) for velocity.

    Args:
        gamma: Where the weight stops growing, > 0. Almost clean samples no longer drown the others.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = _positive(gamma)

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return min(SNR, gamma)."""
        return _snr(alpha, sigma).clamp(max=self.gamma)


class SoftMinSNR(X0Weighting):
    """SNR gamma / (SNR + gamma) on the error of x0_hat: Crowson et al. 2024 (arXiv:2401.11605).

    The minimum of min-SNR without its corner: half of gamma where the SNR is gamma.

    Args:
        gamma: What the weight grows to, > 0.
    """

    def __init__(self, gamma: float = 4.0) -> None:
        self.gamma = _positive(gamma)

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return 1 / (1 / SNR + 1 / gamma)."""
        return 1 / (1 / _snr(alpha, sigma) + 1 / self.gamma)


class EDMWeighting(X0Weighting):
    """lambda = (s**2 + sigma_data**2) / (s sigma_data)**2 on the error of x0_hat, at the noise level s.

    Karras et al. 2022 (arXiv:2206.00364), Table 1. It is SNR + 1 / sigma_data**2; on the output of ``EDM`` it
    is 1 and ``Uniform`` is the same, so this is for other predictions.

    Args:
        sigma_data: Standard deviation of x0, > 0: 0.5 for images in [-1, 1], 1 for scaled latents.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if sigma_data <= 0:
            raise ValueError(f"weighting.sigma_data must be > 0, got {sigma_data}")
        self.sigma_data = sigma_data

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return SNR + 1 / sigma_data**2."""
        return _snr(alpha, sigma) + self.sigma_data**-2


class FlowError(X0Weighting):
    """Weight 1 on the error of the straight line's velocity eps - x0, whatever the network predicts.

    With ``X0`` on ``RectifiedFlow``: x-prediction with velocity loss (Li & He 2025, arXiv:2511.13720).

    Args:
        floor: Smallest sigma in its denominator, > 0: an error of x0_hat is one of the velocity over sigma.
    """

    def __init__(self, floor: float = 0.05) -> None:
        if floor <= 0:
            raise ValueError(f"weighting.floor must be > 0, got {floor}")
        self.floor = floor

    def x0(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return (alpha + sigma)**2 / sigma**2."""
        return ((alpha + sigma) / sigma.clamp_min(self.floor)).square()


def _snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha / sigma).square()


def _positive(gamma: float) -> float:
    if gamma <= 0:
        raise ValueError(f"weighting.gamma must be > 0, got {gamma}")
    return gamma
