"""An image of low resolution."""

from __future__ import annotations

import torch.nn.functional as F

from ldm.conditioners.spatial import Spatial
from ldm.latents.space import LatentSpace
from ldm.types import Batch, Cond


class SuperResolution(Spatial):
    """The low-resolution image at the latent's size, in the image's channels (Rombach et al. 2021, sec. 4.4).

    It is resized bicubically (antialiased where it shrinks) and kept in [-1, 1]. The null condition is grey.

    Args:
        scale: Side of the image per side of the low-resolution one.
        dropout: Share of training samples of which nothing is shown.
    """

    reads = ("low_res",)

    def __init__(self, scale: int = 4, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        if scale < 1:
            raise ValueError(f"conditioner.scale must be at least 1, got {scale}")
        self.scale = scale

    def bind(self, latents: LatentSpace) -> None:
        """Take the number of the image's channels."""
        super().bind(latents)
        self.spatial_channels = latents.image_channels

    def forward(self, batch: Batch) -> Cond:
        """Resize ``batch["low_res"]``, (B, C, h', w') in [-1, 1]."""
        self._require(batch)
        low = batch["low_res"]
        size = self._latent_size(low, self.scale)
        resized = F.interpolate(low, size, mode="bicubic", antialias=True)
        return Cond(spatial=resized.clamp(-1.0, 1.0))

    def null(self, batch: Batch) -> Cond:
        """Return grey, 0."""
        self._require(batch)
        low = batch["low_res"]
        size = self._latent_size(low, self.scale)
        return Cond(spatial=low.new_zeros(*low.shape[:2], *size))

    def check_values(self, batch: Batch) -> None:
        """Check that images are ``scale`` times as large as their low-resolution copies."""
        low, image = batch.get("low_res"), batch.get("image")
        if low is None or image is None:
            return
        for side, of_low in zip(image.shape[-2:], low.shape[-2:], strict=True):
            if side != self.scale * of_low:
                raise ValueError(
                    f"images of size {side} have low-resolution copies of size {of_low}, "
                    f"expected {side / self.scale:g} at conditioner.scale={self.scale}"
                )
