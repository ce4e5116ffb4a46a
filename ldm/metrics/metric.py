"""Metrics: sums over images, which processes can add up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.distributed.group import Group
from ldm.types import Batch

Metadata = dict[str, str | int | float]
"""A record: what it takes to obtain a number again."""


@dataclass(frozen=True)
class ReferenceInfo:
    """The reference set of an evaluation, before its images are read.

    Args:
        identity: Text that changes when they do (data, number, size, crop); None: unknown.
        cache: Folder for their statistics; None keeps them in memory only.
        size: Side of the images that are measured, in pixels; None: not known yet.
        fingerprint: What records call them: the same for the same images wherever they lie; None takes a
            hash of ``identity``.
    """

    identity: str | None = None
    cache: Path | None = None
    size: int | None = None
    fingerprint: str | None = None


class Metric(ABC):
    """Measures generated images: ``begin``, ``update_real`` and ``update`` by batches, ``sync``, ``compute``.

    States are float64 sums, or rows with the index of their image: so any split over batches and processes
    gives the same value.

    Attributes:
        higher_is_better: By name of a value: True if higher ones are better, False if lower ones are, as in
            torchmetrics; absent if neither is.
        failures: What the last ``compute`` could not compute although it could the rest: why, by name.
    """

    higher_is_better: Mapping[str, bool] = MappingProxyType({})
    failures: Mapping[str, str] = MappingProxyType({})

    def begin(self, reference: ReferenceInfo, group: Group) -> None:
        """Begin an evaluation; all processes call it. Most metrics only forget the one before."""
        self.reset()

    @property
    def needs_real(self) -> bool:
        """Whether ``update_real`` must be called with all real images before ``sync``."""
        return False

    def update_real(self, batch: Batch) -> None:
        """Add the real images ``batch["image"]``, if they are compared with as a set."""
        return None

    @abstractmethod
    def update(self, images: Tensor, batch: Batch) -> None:
        """Add the images of one batch.

        Args:
            images: (B, 3, H, W) in [-1, 1], generated for the samples of ``batch``, on the levels of a file.
            batch: The B samples they were generated for, with their index in the evaluation.
        """

    @abstractmethod
    def sync(self, group: Group) -> None:
        """Replace this process's sums by those of all processes; call it once, before ``compute``."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the values by name; empty if there was nothing to measure. Called on the first process."""

    @abstractmethod
    def reset(self) -> None:
        """Drop all images."""

    def metadata(self, name: str) -> Metadata:
        """Return the record of the value ``name`` of the last ``compute``."""
        return {"metric": f"{type(self).__module__}.{type(self).__qualname__}"}

    def to(self, device: torch.device | str) -> None:
        """Move the networks that the metric measures with."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)


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


class MeansMetric(Metric):
    """A metric whose values are means over images.

    Args:
        names: Names of the values.
        higher_is_better: Whether higher values are better; None if neither direction is.
    """

    def __init__(self, names: Iterable[str], higher_is_better: bool | None = None) -> None:
        self.names = tuple(names)
        if higher_is_better is not None:
            self.higher_is_better = dict.fromkeys(self.names, higher_is_better)
        self.reset()

    @override
    def reset(self) -> None:
        self._means = {name: Mean() for name in self.names}

    def add(self, name: str, values: Tensor) -> None:
        """Add one value per image, (B,)."""
        self._means[name].update(values)

    @override
    def sync(self, group: Group) -> None:
        for mean in self._means.values():
            mean.sync(group)

    @override
    def compute(self) -> dict[str, float]:
        return {
            name: value for each, mean in self._means.items() for name, value in mean.compute(each).items()
        }

    @override
    def metadata(self, name: str) -> Metadata:
        return super().metadata(name) | {"num": self._means[name].count}


class MeanMetric(MeansMetric):
    """A metric that is the mean of one number per image.

    Args:
        name: Name of the value.
        higher_is_better: Whether higher values are better; None if neither direction is.
    """

    def __init__(self, name: str, higher_is_better: bool | None = None) -> None:
        super().__init__([name], higher_is_better)

    @abstractmethod
    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Return one number per image, (B,)."""

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        self.add(self.names[0], self.measure(images, batch))
