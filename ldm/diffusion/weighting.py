"""How much each timestep counts in the loss, as a function of SNR = alpha_t**2 / sigma_t**2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.prediction import Prediction


class Weighting(ABC):
    """Weight of the squared error of a sample."""

    @abstractmethod
    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weigh the squared error of ``prediction``'s raw output.

        Args:
            snr: (B,) float32 in [0, inf], both ends included.
            prediction: What the raw output means.

        Returns:
            (B,) float32, finite and >= 0.
        """


class Uniform(Weighting):
    """Weight 1 on the prediction's own target: L_simple, Ho et al. 2020 (arXiv:2006.11239), Eq. 14."""

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Return ones."""
        return torch.ones_like(snr)


class MinSNR(Weighting):
    """min(SNR, gamma) on the error of x0_hat: Hang et al. 2023 (arXiv:2303.09556), Section 3.4.

    On the raw output this is min(1, gamma / SNR) for epsilon, min(SNR, gamma) / (SNR + 1) for velocity.

    Args:
        gamma: Where the weight stops growing, > 0. Almost clean samples no longer drown the others.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if gamma <= 0:
            raise ValueError(f"weighting.gamma must be > 0, got {gamma}")
        self.gamma = gamma

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Return min(SNR, gamma) in the space of ``prediction``."""
        return from_x0(lambda snr: snr.clamp(max=self.gamma), snr, prediction)


def from_x0(weight: Callable[[Tensor], Tensor], snr: Tensor, prediction: Prediction) -> Tensor:
    """Turn a weight on the error of x0_hat into the equivalent one on the raw output's error.

    Args:
        weight: w(SNR) in x0 space, elementwise.
        snr: (B,) in [0, inf].
        prediction: What the raw output means.

    Returns:
        (B,) w(SNR) / error_ratio(SNR), finite where that has a limit at SNR 0 and infinity.
    """
    snr = snr.clamp(1e-12, 1e12)  # instead of 0 / 0 at the ends: the limits, to 12 digits
    return weight(snr) / prediction.error_ratio(snr)
