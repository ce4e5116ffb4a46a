"""What every conditioner is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from ldm.types import Batch, Cond


class Conditioner(nn.Module, ABC):
    """Turns a batch into a condition. Any encoder that produces a sequence of tokens can be one.

    Args:
        dropout: Share of training samples that get the null condition, in [0, 1]; what classifier-free
            guidance needs (Ho & Salimans 2022).
    """

    reads: ClassVar[Literal["text", "label"] | None] = None
    """Field of a batch that it conditions on."""
    token_width: int | None = None
    """D of ``Cond.tokens``; None without tokens."""
    vector_width: int | None = None
    """E of ``Cond.vector``; None without a vector."""
    spatial_channels: int = 0
    """C' of ``Cond.spatial``; 0 without it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"conditioner.dropout must be in [0, 1], got {dropout}")
        self.dropout = dropout

    @abstractmethod
    def forward(self, batch: Batch) -> Cond:
        """Encode what ``batch`` says of its B samples."""

    @abstractmethod
    def null(self, batch_size: int) -> Cond:
        """Return the condition that says nothing, for ``batch_size`` samples."""

    def check(self, batch: Batch) -> None:
        """Check that nothing ``batch`` says would be cut off or misread: what a user typed, before sampling.

        Raises:
            ValueError: If it would; the message says what is there and what fits.
        """

    def dropped(self, batch: Batch, uniform: Tensor) -> Cond:
        """Encode ``batch`` with dropout.

        Args:
            batch: B samples.
            uniform: (B,) in [0, 1): a sample below ``dropout`` gets the null condition.
        """
        cond = self(batch)
        if self.dropout == 0.0:
            return cond
        return cond.where(uniform >= self.dropout, self.null(len(uniform)))

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that this conditioner is built on, with their SHA-256."""
        return {}
