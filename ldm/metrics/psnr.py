"""How close pictures come to their originals, pixel by pixel."""

from __future__ import annotations

from torch import Tensor

from ldm.losses import psnr
from ldm.metrics.metric import MeanMetric
from ldm.types import Batch


class PSNR(MeanMetric):
    """Peak signal-to-noise ratio in dB against ``batch["image"]``: of each picture, then the mean.

    Equal pictures count as the largest value that float32 tells apart.

    Args:
        name: Name of the value; ``psnr`` alone is the autoencoder's own, with z drawn from q(z | image).
    """

    def __init__(self, name: str = "picture_psnr") -> None:
        super().__init__(name)

    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare pictures with their originals, in dB."""
        return psnr(images.double(), batch["image"])  # does not depend on the batch that a picture is in
