"""How close images come to their originals, pixel by pixel."""

from __future__ import annotations

from torch import Tensor

from ldm.losses.terms import psnr
from ldm.metrics.metric import MeanMetric
from ldm.types import Batch


class PSNR(MeanMetric):
    """Peak signal-to-noise ratio in dB against ``batch["image"]``: of each image, then the mean.

    Equal images count as the largest value that float32 tells apart.

    Args:
        name: Name of the value; ``psnr`` alone is the autoencoder's own, with z drawn from q(z | image).
    """

    def __init__(self, name: str = "image_psnr") -> None:
        super().__init__(name)

    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare images with their originals, in dB."""
        return psnr(images.double(), batch["image"])  # does not depend on the batch that an image is in
