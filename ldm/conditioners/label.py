"""Class labels."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.types import Batch, Cond


class ClassLabel(Conditioner):
    """A learned vector per class, added to the timestep embedding.

    Args:
        num_classes: Labels are 0 .. num_classes - 1.
        width: E of the vector.
        dropout: Fraction of training samples that get the null condition, a learned vector too.
    """

    reads = ("label",)

    def __init__(self, num_classes: int, width: int = 64, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.num_classes = num_classes
        self.vector_width = width
        self.embedding = nn.Embedding(num_classes + 1, width)  # the last row is the null condition

    def forward(self, batch: Batch) -> Cond:
        """Look up ``batch["label"]`` (B,)."""
        self._require(batch)
        return Cond(vector=self.embedding(batch["label"]))

    @property
    @override
    def classes(self) -> dict[str, int]:
        return {"label": self.num_classes}

    def check_values(self, batch: Batch) -> None:
        """Check that each label is one of the classes."""
        for label, key in zip(batch.get("label", torch.empty(0)).tolist(), batch["key"], strict=False):
            if not 0 <= label < self.num_classes:
                raise ValueError(
                    f"sample '{key}': label {label} is no class of the model, expected 0 to "
                    f"{self.num_classes - 1} (conditioner.num_classes={self.num_classes})"
                )

    def null(self, batch: Batch) -> Cond:
        """Return the null class's vector, once per sample."""
        device = self.embedding.weight.device
        return Cond(vector=self.embedding(torch.full((len(batch["key"]),), self.num_classes, device=device)))
