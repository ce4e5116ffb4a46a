"""Mean and covariance of features, as float64 sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.distributed.group import Group


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features, for the Fréchet distance.

    Args:
        mean: (F,) float64.
        covariance: (F, F) float64, unbiased.
        count: Number of feature vectors; 0 if unknown.
    """

    mean: Tensor
    covariance: Tensor
    count: int = 0


class GaussianMoments:
    """Count, sum and sum of outer products of feature vectors, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros(0, dtype=torch.float64)
        self.outer = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """(F,) float64."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(F, F) float64, unbiased (divided by count - 1)."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance.

        Raises:
            ValueError: If there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self.mean, self.covariance, self.count)

    def update(self, features: Tensor) -> None:
        """Add feature vectors (B, F)."""
        features = features.detach().cpu().double()
        self._make_room(features.shape[1])
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: GaussianMoments) -> GaussianMoments:
        """Return the moments of the union of two sets."""
        merged = GaussianMoments()
        merged._make_room(max(len(self.sum), len(other.sum)))
        for one in (self, other):
            if one.count:
                merged.count += one.count
                merged.sum += one.sum
                merged.outer += one.outer
        return merged

    def sync(self, group: Group) -> None:
        """Add up over processes; one that saw no image learns the width from the others."""
        width = len(self.sum)
        seen = group.all_reduce(torch.tensor([self.count, width, width > 0], dtype=torch.float64)).tolist()
        if seen[2]:
            self._make_room(int(seen[1] / seen[2]))
            self.count, self.sum, self.outer = (
                int(seen[0]),
                group.all_reduce(self.sum),
                group.all_reduce(self.outer),
            )

    def _make_room(self, width: int) -> None:
        if len(self.sum) == 0:
            self.sum, self.outer = self.sum.new_zeros(width), self.outer.new_zeros(width, width)
        if len(self.sum) != width:
            raise ValueError(f"features have width {width}, expected {len(self.sum)} as before")
