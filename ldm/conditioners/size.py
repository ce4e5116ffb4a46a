"""Size and crop of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.conditioners.base import Conditioner
from ldm.nets.layers import TimestepMLP, timestep_embedding
from ldm.types import Batch, Cond

NUMBERS = 6
"""Height and width before anything was resized, top and left of the crop, height and width of the crop."""


class ImageSize(Conditioner):
    """Original size, crop and target size of an image as a vector, for models of all shapes.

    The micro-conditioning of Podell et al. 2023 (arXiv:2307.01952), section 2.2: each number is embedded in
    sines and cosines as a timestep is, and two linear layers turn all of them into the vector. So images that
    were small, or cropped, can be trained on and need not be imitated: drawn ones get the size that is asked
    for, not cropped. The null condition is an image of size 0; beside others (``Composite``) none is needed.

    Args:
        width: E of the vector.
        embedding_width: Sines and cosines of each number, an even number.
        dropout: Fraction of training samples that get the null condition.
    """

    reads = ("size",)

    def __init__(self, width: int = 64, embedding_width: int = 256, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.vector_width = width
        self.embedding_width = embedding_width
        self.embedding = TimestepMLP(NUMBERS * embedding_width, width)

    def forward(self, batch: Batch) -> Cond:
        """Embed ``batch["size"]``, (B, 6) pixels."""
        self._require(batch)
        return Cond(vector=self._embed(batch["size"]))

    def null(self, batch: Batch) -> Cond:
        """Return the vector of an image of size 0, once per sample."""
        device = self.embedding.linear_1.weight.device
        return Cond(vector=self._embed(torch.zeros(len(batch["key"]), NUMBERS, device=device)))

    def _embed(self, size: Tensor) -> Tensor:
        waves = timestep_embedding(size.flatten(), self.embedding_width).view(len(size), -1)
        return self.embedding(waves.to(self.embedding.linear_1.weight.dtype))
