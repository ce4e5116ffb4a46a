"""SSIM: similarity of images to their originals in local means, contrasts and structure."""

from __future__ import annotations

from torch import Tensor

from ldm.metrics.metric import MeanMetric
from ldm.types import Batch


class SSIM(MeanMetric):
    """Structural similarity (Wang et al. 2004, Eq. 13) against ``batch["image"]``, averaged over images.

    torchmetrics' on images in [0, 1]: Gaussian window of deviation 1.5, K = (0.01, 0.03), all channels.

    Args:
        name: Name of the value.
    """

    def __init__(self, name: str = "ssim") -> None:
        super().__init__(name, higher_is_better=True)

    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare images with their originals; 1 is equal."""
        # here: it brings all of torchmetrics, which takes seconds
        from torchmetrics.functional.image import structural_similarity_index_measure

        # not in [-1, 1]: the luminance term takes means for positive
        one, other = (x.double() / 2.0 + 0.5 for x in (images, batch["image"]))
        value = structural_similarity_index_measure(one, other, reduction="none", data_range=1.0)
        assert isinstance(value, Tensor)
        return value
