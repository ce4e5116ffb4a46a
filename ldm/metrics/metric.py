"""What every metric is: sums over pictures, which processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.types import Batch

AllReduce = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes and returns the sum to each; one process gets its own back."""


class Metric(ABC):
    """Measures generated pictures: ``update`` for each batch, ``sync`` once, ``compute``, ``reset``.

    States are float64 sums, so that any split over batches and processes gives the same value.
    """

    @abstractmethod
    def update(self, images: Tensor, batch: Batch) -> None:
        """Add the pictures of one batch.

        Args:
            images: (B, 3, H, W) in [-1, 1], generated for the samples of ``batch``, on the levels of uint8.
            batch: The B samples they were generated for.
        """

    @abstractmethod
    def sync(self, all_reduce: AllReduce) -> None:
        """Replace this process's sums by those of all processes; call it once, before ``compute``."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the values by name; empty if there was nothing to measure."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all pictures."""

    def to(self, device: torch.device | str) -> None:
        """Move the networks that the metric measures with."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)


class Mean:
    """A mean over all pictures: sum and count."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add one value per picture, (B,)."""
        self._sums += torch.tensor([float(values.double().sum()), len(values)], dtype=torch.float64)

    def sync(self, all_reduce: AllReduce) -> None:
        """Add up over processes."""
        self._sums = all_reduce(self._sums)

    def compute(self, name: str) -> dict[str, float]:
        """Return ``{name: mean}``, or nothing without pictures."""
        total, count = self._sums.tolist()
        return {name: total / count} if count else {}
