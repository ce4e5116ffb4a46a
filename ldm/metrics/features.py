"""The networks that metrics measure with, as far as metrics know them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Features(Protocol):
    """Describes a picture by a vector."""

    def image_features(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to features (B, F)."""
        ...


@runtime_checkable
class ImageText(Protocol):
    """Maps pictures and captions into one space, where those that belong together are close."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        ...

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        ...

    def image_features(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to features (B, F)."""
        ...
