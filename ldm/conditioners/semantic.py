"""A class for every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.conditioners.spatial import Spatial
from ldm.types import Batch, Cond


class SemanticMap(Spatial):
    """The fraction of each class in each pixel of the latent, mixed by a learned 1x1 convolution.

    Rombach et al. 2021, sec. 4.3.2, concatenate shrunk maps likewise. The convolution has no bias, so the
    null condition, a map without any class, is 0.

    Args:
        num_classes: Classes of the maps are 0 .. num_classes - 1.
        channels: C' of the condition.
        dropout: Share of training samples that get the null condition.
    """

    reads = ("label_map",)

    def __init__(self, num_classes: int, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.num_classes = num_classes
        self.spatial_channels = channels
        self.mix = nn.Conv2d(num_classes, channels, 1, bias=False)

    def forward(self, batch: Batch) -> Cond:
        """Encode ``batch["label_map"]``, (B, H, W) int64."""
        self._require(batch)
        label_map = batch["label_map"]
        size = self._latent_size(label_map)
        return Cond(spatial=self.mix(class_fractions(label_map, size, self.num_classes)))

    def null(self, batch: Batch) -> Cond:
        """Return 0, the map without any class."""
        self._require(batch)
        label_map = batch["label_map"]
        size = self._latent_size(label_map)
        shape = (len(label_map), self.spatial_channels, *size)
        return Cond(spatial=torch.zeros(shape, device=label_map.device))

    @property
    @override
    def classes(self) -> dict[str, int]:
        return {"label_map": self.num_classes}

    def check_values(self, batch: Batch) -> None:
        """Check that each pixel has one of the classes."""
        if "label_map" not in batch:
            return
        highest = batch["label_map"].flatten(1).amax(1)
        for key, found in zip(batch["key"], highest.tolist(), strict=True):
            if found >= self.num_classes:
                raise ValueError(
                    f"sample '{key}': class {found} of its map is no class of the model, expected 0 to "
                    f"{self.num_classes - 1} (conditioner.num_classes={self.num_classes})"
                )


def class_fractions(label_map: Tensor, size: tuple[int, int], num_classes: int) -> Tensor:
    """Average the one-hot map over the cells of a coarser grid, without ever making it.

    Args:
        label_map: (B, H, W) int64 in [0, num_classes).
        size: (h, w); they divide H and W.
        num_classes: K.

    Returns:
        (B, K, h, w) in [0, 1]; the classes of a cell sum to 1.
    """
    height, width = size
    cells = label_map.unflatten(2, (width, -1)).unflatten(1, (height, -1))  # (B, h, H/h, w, W/w)
    cells = cells.transpose(2, 3).flatten(3)
    counts = torch.zeros(*cells.shape[:3], num_classes, device=label_map.device)
    counts.scatter_add_(3, cells, torch.ones_like(cells, dtype=counts.dtype))
    return (counts / cells.shape[3]).permute(0, 3, 1, 2)
