"""Kullback-Leibler divergence of a Gaussian posterior."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from ldm.losses.term import LossTerm
from ldm.types import Batch


class KL(LossTerm):
    """KL divergence of q(z | image) from the standard normal prior, in nats.

    Args:
        weight: Factor of the term in the loss.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
    """

    name = "kl"

    def __init__(self, weight: float, start: int = 0, ramp: int = 0) -> None:
        super().__init__(weight, start=start, ramp=ramp)

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        return kl_to_standard_normal(outputs["mean"], outputs["log_var"])


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = sum (mu^2 + sigma^2 - 1 - ln sigma^2) / 2, in nats.

    Kingma & Welling 2013 (arXiv:1312.6114), app. B.

    Args:
        mean: mu, (B, ...).
        log_var: ln sigma^2, same shape.

    Returns:
        (B,) float32, 0 where the posterior is the prior.
    """
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).flatten(1).sum(1)
