"""What every metric is: sums over pictures, which processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.metrics.group import Group
from ldm.types import Batch

Says = dict[str, str | int | float]
"""A record: what one must know to repeat a number."""


@dataclass(frozen=True)
class Reals:
    """The real pictures of an evaluation, before anyone has looked at them.

    Args:
        identity: Text that changes when they do (data, number, size, crop); None: nobody knows.
        cache: Folder for their statistics; None keeps them in memory only.
        size: Side of the pictures that are measured, in pixels; None: nobody knows yet.
        fingerprint: What records call them: the same for the same pictures wherever they lie; None takes a
            hash of ``identity``.
    """

    identity: str | None = None
    cache: Path | None = None
    size: int | None = None
    fingerprint: str | None = None


class Metric(ABC):
    """Measures generated pictures: ``begin``, ``see`` and ``update`` for each batch, ``sync``, ``compute``.

    States are float64 sums, or rows with the place of their picture: so any split over batches and processes
    gives the same value.

    Attributes:
        failures: What the last ``compute`` could not compute although it could the rest: why, by name.
    """

    failures: Mapping[str, str] = {}

    def begin(self, reals: Reals, group: Group) -> None:
        """Begin an evaluation; all processes call it. Most metrics only forget the one before."""
        self.reset()

    @property
    def wants_real(self) -> bool:
        """Whether ``see`` must be called with all real pictures before ``sync``."""
        return False

    def see(self, batch: Batch) -> None:
        """Look at the real pictures ``batch["image"]``, if they are to be compared with as a set."""
        return None

    @abstractmethod
    def update(self, images: Tensor, batch: Batch) -> None:
        """Add the pictures of one batch.

        Args:
            images: (B, 3, H, W) in [-1, 1], generated for the samples of ``batch``, on the levels of uint8.
            batch: The B samples they were generated for, with their places in the evaluation.
        """

    @abstractmethod
    def sync(self, group: Group) -> None:
        """Replace this process's sums by those of all processes; call it once, before ``compute``."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the values by name; empty if there was nothing to measure. Called on the first process."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all pictures."""

    def says(self, name: str) -> Says:
        """Say how the value ``name`` of the last ``compute`` came about."""
        return {"metric": f"{type(self).__module__}.{type(self).__qualname__}"}

    def to(self, device: torch.device | str) -> None:
        """Move the networks that the metric measures with."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)


def told(error: Exception) -> str:
    """Write an error as its kind and message."""
    return f"{type(error).__name__}: {error}"


class Mean:
    """A mean over all pictures: sum and count."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self._sums[1])

    def update(self, values: Tensor) -> None:
        """Add one value per picture, (B,)."""
        self._sums += torch.tensor([float(values.cpu().double().sum()), len(values)], dtype=torch.float64)

    def sync(self, group: Group) -> None:
        """Add up over processes."""
        self._sums = group.sum(self._sums)

    def compute(self, name: str) -> dict[str, float]:
        """Return ``{name: mean}``, or nothing without pictures."""
        total, count = self._sums.tolist()
        return {name: total / count} if count else {}


class MeanMetric(Metric):
    """A metric that is the mean of one number per picture.

    Args:
        name: Name of the value.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    @abstractmethod
    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Return one number per picture, (B,)."""

    def reset(self) -> None:
        """Forget all pictures."""
        self._mean = Mean()

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add pictures."""
        self._mean.update(self.measure(images, batch))

    def sync(self, group: Group) -> None:
        """Add up over processes."""
        self._mean.sync(group)

    def compute(self) -> dict[str, float]:
        """Return the mean."""
        return self._mean.compute(self.name)

    def says(self, name: str) -> Says:
        """Add the number of pictures."""
        return super().says(name) | {"num": self._mean.count}
