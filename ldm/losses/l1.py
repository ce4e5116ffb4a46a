"""Absolute error of a reconstruction."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from ldm.losses.pixel_error import PixelError


class L1(PixelError):
    """Absolute error of the reconstructed image.

    Args:
        weight: Factor of the term in the loss.
        reduction: Sum over the 3 H W values of an image, or their mean.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
        name: Name in the log.
    """

    @override
    def error(self, output: Tensor, target: Tensor) -> Tensor:
        return absolute_error(output, target)


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum the absolute errors of each sample.

    Args:
        output: (B, ...).
        target: Same shape.

    Returns:
        (B,) float32.
    """
    return (output.float() - target.float()).abs().flatten(1).sum(1)
