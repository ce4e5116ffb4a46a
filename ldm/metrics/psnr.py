"""How close pictures come to their originals, pixel by pixel."""

from __future__ import annotations

from torch import Tensor

from ldm.losses import psnr
from ldm.metrics.metric import AllReduce, Mean, Metric
from ldm.types import Batch


class PSNR(Metric):
    """Peak signal-to-noise ratio in dB against ``batch["image"]``: of each picture, then the mean.

    Args:
        name: Name of the value; ``psnr`` alone is the autoencoder's own, with z drawn from q(z | image).
    """

    def __init__(self, name: str = "picture_psnr") -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self._mean = Mean()

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add pictures and their originals."""
        self._mean.update(psnr(images, batch["image"]))

    def sync(self, all_reduce: AllReduce) -> None:
        """Add up over processes."""
        self._mean.sync(all_reduce)

    def compute(self) -> dict[str, float]:
        """Return the mean in dB; equal pictures count as the largest value that float32 tells apart."""
        return self._mean.compute(self.name)
