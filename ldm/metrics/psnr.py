"""PSNR: similarity of images to their originals, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.metric import MeanMetric
from ldm.types import Batch


class PSNR(MeanMetric):
    """Peak signal-to-noise ratio in dB against ``batch["image"]``: of each image, then the mean.

    Equal images count as the largest value that float32 resolves.

    Args:
        name: Name of the value. Of an autoencoder it is of the mean of z; the stage's ``sampled_psnr`` is of
            a z drawn from q(z | image), and so lower.
    """

    def __init__(self, name: str = "psnr") -> None:
        super().__init__(name, higher_is_better=True)

    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare images with their originals, in dB."""
        return psnr(images.double(), batch["image"])  # does not depend on the batch that an image is in


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample, in dB, for a range of 2 ([-1, 1]).

    Args:
        output: (B, 3, H, W), clamped to [-1, 1] here.
        target: (B, 3, H, W) in [-1, 1].

    Returns:
        (B,) float32, or float64 like ``output``.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    error = (output.to(dtype).clamp(-1.0, 1.0) - target.to(dtype)).square().flatten(1).mean(1)
    return 10.0 * (4.0 / error.clamp_min(1e-12)).log10()
