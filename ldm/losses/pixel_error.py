"""Errors of a reconstruction, pixel by pixel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from ldm.losses.term import LossTerm, Reduction
from ldm.types import Batch


class PixelError(LossTerm):
    """Error of the reconstructed image.

    Args:
        weight: Factor of the term in the loss.
        reduction: Sum over the 3 H W values of an image, or their mean.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
        name: Name in the log.
    """

    def __init__(
        self,
        weight: float = 1.0,
        reduction: Reduction = "sum",
        start: int = 0,
        ramp: int = 0,
        name: str = "reconstruction",
    ) -> None:
        super().__init__(weight, start=start, ramp=ramp)
        self.reduction, self.name = reduction, name

    @abstractmethod
    def error(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum the errors of each sample, both (B, ...): (B,) float32."""

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        total = self.error(outputs["image"], batch["image"])
        return total / batch["image"][0].numel() if self.reduction == "mean" else total
