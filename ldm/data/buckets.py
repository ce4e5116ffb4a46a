"""Aspect-ratio buckets: a table of sizes of about equally many pixels, one of which each image gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm.data.metadata import Kind
from ldm.data.rows import Grouping


class Size(NamedTuple):
    """Height and width of an image in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """Name it as people do, width first."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Buckets:
    """The table of sizes that training images are resized and cropped to, by their proportions.

    Args:
        pixels: Most pixels of a size; None: those of the square of ``data.image_size``.
        multiple: What heights and widths are multiples of, at least the factor of autoencoder x network.
        max_ratio: Longer side by shorter side, at most; longer images lose their ends.

    Raises:
        ValueError: If a number is out of range.
    """

    pixels: int | None = None
    multiple: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        lowest = {"pixels": 1, "multiple": 1, "max_ratio": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"buckets.{name}: got {value}, expected at least {least}")

    def sizes(self, image_size: int) -> list[Size]:
        """List the sizes that fit the budget and cannot grow in one side, from the widest to the highest.

        The largest square is always one of them.

        Args:
            image_size: Side of the square whose pixels are the budget unless ``pixels`` is given.

        Raises:
            ValueError: If not even one square fits.
        """
        budget, step = self.pixels or image_size**2, self.multiple
        side = math.isqrt(budget) // step * step
        if not side:
            raise ValueError(
                f"buckets.multiple: got {step}, but {budget} pixels hold no {step}x{step} image: expected "
                "more pixels or a smaller multiple"
            )
        found = {Size(side, side)}
        for short in range(step, side + step, step):
            long = budget // short // step * step
            if short <= long <= self.max_ratio * short:
                found |= {Size(short, long), Size(long, short)}
        return sorted(found, key=lambda size: size.height / size.width)


@dataclass(frozen=True)
class AspectRatio:
    """Groups samples by the bucket that is nearest to their proportions: least |ln ratio - ln ratio'|.

    Args:
        sizes: The buckets, from the widest to the highest.
        height: Name of the column of heights.
        width: Name of the column of widths; a sample that lacks one of the two is in the bucket nearest to
            the square.
        kept: Leaves samples out; None keeps all.
    """

    sizes: tuple[Size, ...]
    height: str = "height"
    width: str = "width"
    kept: Grouping | None = None

    @property
    def columns(self) -> Mapping[str, Kind]:
        """Columns that it reads."""
        return {**(self.kept.columns if self.kept else {}), self.height: float, self.width: float}

    @property
    def num_groups(self) -> int:
        """Number of buckets."""
        return len(self.sizes)

    @property
    def identity(self) -> str:
        """Text that changes whenever the grouping does."""
        kept = f" where {self.kept.identity}" if self.kept else ""
        return f"{self.height}/{self.width} of {' '.join(map(str, self.sizes))}{kept}"

    def groups(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the number of each sample's bucket, -1 for one that is left out: (N,) int64.

        Args:
            columns: (N,) float64 heights and widths, NaN where unknown, and what ``kept`` reads.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = columns[self.height] / columns[self.width]
        ratio = np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1.0)
        # the middle of two logarithms is that of a geometric mean, which is rounded alike on all machines
        ends = [
            math.sqrt(a.height * b.height / (a.width * b.width))
            for a, b in zip(self.sizes, self.sizes[1:], strict=False)
        ]
        found = np.searchsorted(np.array(ends), ratio).astype(np.int64)
        return found if self.kept is None else np.where(self.kept.groups(columns) >= 0, found, -1)


def without_small(sizes: Sequence[Size], counts: Sequence[int], least: int) -> tuple[Size, ...]:
    """Leave out the buckets with fewer than ``least`` samples, which others then take; keep one at least.

    Args:
        sizes: The buckets.
        counts: Number of samples in each.
        least: Samples of a global batch.
    """
    kept = tuple(size for size, count in zip(sizes, counts, strict=True) if count >= least)
    return kept or (sizes[int(np.argmax(counts))],)
