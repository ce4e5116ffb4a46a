"""Base of conditioners by maps, concatenated to the latent."""

from __future__ import annotations

from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.latents.space import LatentSpace


class Spatial(Conditioner):
    """A map of the latent's height and width, concatenated to x_t (Rombach et al. 2021, sec. 3.3).

    Args:
        dropout: Share of training samples that get the null condition.
    """

    _latents: LatentSpace | None = None

    def bind(self, latents: LatentSpace) -> None:
        """Keep the latent space, which knows the size of a latent."""
        # No submodule: it is the stage's, and would be saved and moved a second time.
        object.__setattr__(self, "_latents", latents)

    @property
    def latents(self) -> LatentSpace:
        """The space that diffusion happens in."""
        if self._latents is None:
            raise RuntimeError(
                f"{type(self).__name__}: call bind(latents) first, as the diffusion stage does"
            )
        return self._latents

    def _latent_size(self, image: Tensor, scale: int = 1) -> tuple[int, int]:
        """Height and width of the latent of images (..., H, W), or of ones ``scale`` times as large."""
        _, height, width = self.latents.shape(*(scale * side for side in image.shape[-2:]))
        return height, width
