"""What every metric is: sums over images, which processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.distributed.group import Group
from ldm.types import Batch

Metadata = dict[str, str | int | float]
"""A record: what one must know to repeat a number."""


@dataclass(frozen=True)
class ReferenceInfo:
    """The real images of an evaluation, before anyone has looked at them.

    Args:
        identity: Text that changes when they do (data, number, size, crop); None: nobody knows.
        cache: Folder for their statistics; None keeps them in memory only.
        size: Side of the images that are measured, in pixels; None: nobody knows yet.
        fingerprint: What records call them: the same for the same images wherever they lie; None takes a
            hash of ``identity``.
    """

    identity: str | None = None
    cache: Path | None = None
    size: int | None = None
    fingerprint: str | None = None


class Metric(ABC):
    """Measures generated images: ``begin``, ``see`` and ``update`` for each batch, ``sync``, ``compute``.

    States are float64 sums, or rows with the place of their image: so any split over batches and processes
    gives the same value.

    Attributes:
        failures: What the last ``compute`` could not compute although it could the rest: why, by name.
    """

    failures: Mapping[str, str] = {}

    def begin(self, reals: ReferenceInfo, group: Group) -> None:
        """Begin an evaluation; all processes call it. Most metrics only forget the one before."""
        self.reset()

    @property
    def needs_real(self) -> bool:
        """Whether ``see`` must be called with all real images before ``sync``."""
        return False

    def update_real(self, batch: Batch) -> None:
        """Look at the real images ``batch["image"]``, if they are to be compared with as a set."""
        return None

    @abstractmethod
    def update(self, images: Tensor, batch: Batch) -> None:
        """Add the images of one batch.

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
        """Forget all images."""

    def metadata(self, name: str) -> Metadata:
        """Say how the value ``name`` of the last ``compute`` came about."""
        return {"metric": f"{type(self).__module__}.{type(self).__qualname__}"}

    def to(self, device: torch.device | str) -> None:
        """Move the networks that the metric measures with."""
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                part.to(device)


def error_text(error: Exception) -> str:
    """Write an error as its kind and message."""
    return f"{type(error).__name__}: {error}"


class Mean:
    """A mean over all images: sum and count."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of values."""
        return int(self._sums[1])

    def update(self, values: Tensor) -> None:
        """Add one value per image, (B,)."""
        self._sums += torch.tensor([float(values.cpu().double().sum()), len(values)], dtype=torch.float64)

    def sync(self, group: Group) -> None:
        """Add up over processes."""
        self._sums = group.all_reduce(self._sums)

    def compute(self, name: str) -> dict[str, float]:
        """Return ``{name: mean}``, or nothing without images."""
        total, count = self._sums.tolist()
        return {name: total / count} if count else {}


class MeanMetric(Metric):
    """A metric that is the mean of one number per image.

    Args:
        name: Name of the value.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    @abstractmethod
    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Return one number per image, (B,)."""

    def reset(self) -> None:
        """Forget all images."""
        self._mean = Mean()

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add images."""
        self._mean.update(self.measure(images, batch))

    def sync(self, group: Group) -> None:
        """Add up over processes."""
        self._mean.sync(group)

    def compute(self) -> dict[str, float]:
        """Return the mean."""
        return self._mean.compute(self.name)

    def metadata(self, name: str) -> Metadata:
        """Add the number of images."""
        return super().metadata(name) | {"num": self._mean.count}
