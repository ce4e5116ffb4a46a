"""Squared error of a reconstruction."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from ldm.losses.pixel_error import PixelError


class L2(PixelError):
    """Squared error of the reconstructed image.

    Args:
        weight: Factor of the term in the loss.
        reduction: Sum over the 3 H W values of an image, or their mean.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
        name: Name in the log.
    """

    @override
    def error(self, output: Tensor, target: Tensor) -> Tensor:
        return squared_error(output, target)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum the squared errors of each sample: L_recon = sum_i ||x_i - x_hat_i||^2.

    Args:
        output: (B, ...).
        target: Same shape.

    Returns:
        (B,) float32.
    """
    return (output.float() - target.float()).square().flatten(1).sum(1)
