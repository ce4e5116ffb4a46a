"""An image with a hole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioners.spatial import Spatial
from ldm.latents.space import LatentSpace
from ldm.types import Batch, Cond


class Inpainting(Spatial):
    """The mask and the latent of what it leaves: 1 + C channels, in the order of Stable Diffusion inpainting.

    Rombach et al. 2021, sec. 4.5. The masked image is grey (0) where it is to be painted; its latent is the
    mean of q(z | image), so the condition is not random. The mask comes to the latent's size by nearest
    neighbour, as in Stable Diffusion. The null condition is that of a mask that leaves nothing.

    Args:
        dropout: Fraction of training samples of which nothing is shown.
    """

    reads = ("image", "mask")

    def bind(self, latents: LatentSpace) -> None:
        """Take the encoder, and the number of its channels."""
        super().bind(latents)
        self.spatial_channels = 1 + latents.channels

    def forward(self, batch: Batch) -> Cond:
        """Encode ``batch["image"]`` (B, 3, H, W) where ``batch["mask"]`` (B, 1, H, W) is 0."""
        self._require(batch)
        return Cond(spatial=self._seen(batch["image"], batch["mask"]))

    def null(self, batch: Batch) -> Cond:
        """Return what a mask of ones gives."""
        self._require(batch)
        image, mask = batch["image"][:1], batch["mask"][:1]
        seen = self._seen(torch.zeros_like(image), torch.ones_like(mask))
        return Cond(spatial=seen.expand(len(batch["mask"]), -1, -1, -1))

    def _seen(self, image: Tensor, mask: Tensor) -> Tensor:
        size = self._latent_size(image)
        masked: Batch = {"image": image * (1.0 - mask)}
        latent = self.latents.encode(masked, image.new_zeros(len(image), self.latents.channels, *size))
        return torch.cat([F.interpolate(mask, size, mode="nearest"), latent], dim=1)
