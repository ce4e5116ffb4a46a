"""Squared error of a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from ldm.losses.term import LossTerm
from ldm.types import Batch


class Reconstruction(LossTerm):
    """Squared error of the reconstructed image, summed over the image.

    Args:
        weight: Factor of the term in the loss.
    """

    name = "reconstruction"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        return squared_error(outputs["image"], batch["image"])


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum the squared errors of each sample: L_recon = sum_i ||x_i - x_hat_i||^2.

    Args:
        output: (B, ...).
        target: Same shape.

    Returns:
        (B,) float32.
    """
    return (output.float() - target.float()).square().flatten(1).sum(1)
