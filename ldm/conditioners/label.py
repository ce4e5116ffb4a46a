"""Class labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.types import Batch, Cond


class ClassLabel(Conditioner):
    """A learned vector per class, added to the timestep embedding, or attended to as a token.

    Args:
        num_classes: Labels are 0 .. num_classes - 1.
        width: E of the vector.
        dropout: Fraction of training samples that get the null condition, a learned vector too.
        std: Standard deviation of the vectors before training; 0.02 in DiT.
        as_token: Give the vector as the only token, (B, 1, E), as latent diffusion does for ImageNet.
    """

    reads = ("label",)

    def __init__(
        self,
        num_classes: int,
        width: int = 64,
        dropout: float = 0.1,
        std: float = 1.0,
        as_token: bool = False,
    ) -> None:
        super().__init__(dropout)
        self.num_classes, self.as_token = num_classes, as_token
        self.token_width, self.vector_width = (width, None) if as_token else (None, width)
        self.embedding = nn.Embedding(num_classes + 1, width)  # the last row is the null condition
        with torch.no_grad():
            self.embedding.weight.mul_(std)

    def forward(self, batch: Batch) -> Cond:
        """Look up ``batch["label"]`` (B,)."""
        self._require(batch)
        return self._cond(batch["label"])

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
        return self._cond(torch.full((len(batch["key"]),), self.num_classes, device=device))

    def _cond(self, label: Tensor) -> Cond:
        vector = self.embedding(label)
        return Cond(tokens=vector[:, None]) if self.as_token else Cond(vector=vector)
