"""The Fréchet distance between two sets of pictures, as Gaussians of their features.

Heusel et al. 2017 (arXiv:1706.08500), Eq. 6: with means m and covariances C,
d^2 = |m_1 - m_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The value falls with the number of pictures and
with the features used: compare values of equal number and features only, and against the floor.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.features import Features
from ldm.metrics.metric import AllReduce, Metric
from ldm.types import Batch


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

    def update(self, features: Tensor) -> None:
        """Add feature vectors (B, F)."""
        features = features.detach().cpu().double()
        self._make_room(features.shape[1])
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: GaussianMoments) -> GaussianMoments:
        """Return the moments of both sets together."""
        both = GaussianMoments()
        both._make_room(max(len(self.sum), len(other.sum)))
        for one in (self, other):
            if one.count:
                both.count += one.count
                both.sum += one.sum
                both.outer += one.outer
        return both

    def sync(self, all_reduce: AllReduce) -> None:
        """Add up over processes; one that saw no picture learns the width from the others."""
        width = len(self.sum)
        seen = all_reduce(torch.tensor([self.count, width, width > 0], dtype=torch.float64)).tolist()
        if seen[2]:
            self._make_room(int(seen[1] / seen[2]))
            self.count, self.sum, self.outer = int(seen[0]), all_reduce(self.sum), all_reduce(self.outer)

    def save(self, path: str | Path) -> None:
        """Write the moments as .npz, to compare with later."""
        np.savez(path, count=self.count, sum=self.sum.numpy(), outer=self.outer.numpy())

    @classmethod
    def load(cls, path: str | Path) -> GaussianMoments:
        """Read what ``save`` wrote."""
        moments = cls()
        with np.load(path, allow_pickle=False) as arrays:
            moments.count = int(arrays["count"])
            moments.sum, moments.outer = torch.from_numpy(arrays["sum"]), torch.from_numpy(arrays["outer"])
        return moments

    def _make_room(self, width: int) -> None:
        if len(self.sum) == 0:
            self.sum, self.outer = self.sum.new_zeros(width), self.outer.new_zeros(width, width)
        if len(self.sum) != width:
            raise ValueError(f"features have width {width}, expected {len(self.sum)} as before")


def frechet_distance(a: GaussianMoments, b: GaussianMoments) -> float:
    """Compute the squared Fréchet distance between two Gaussians.

    Tr (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is
    symmetric: no complex numbers, and no iteration that may fail.

    Raises:
        ValueError: If one of them has seen fewer than two pictures.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(
            f"the Fréchet distance got {a.count} and {b.count} pictures, expected at least 2 of each"
        )
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    product = root @ second @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0.0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2.0 * overlap
    return max(0.0, float(distance))


class FrechetDistance(Metric):
    """Fréchet distance of the generated pictures to the real ones of the same batches.

    Reports beside it the floor: the distance between two halves of the real pictures. A generator whose
    value is near the floor cannot be told from the data. (Halves have half the pictures: the floor is high
    rather than low.)

    Args:
        features: Network that describes a picture.
        name: Name of the value; the floor is ``<name>_floor``.
    """

    def __init__(self, features: Features, name: str = "fid/clip") -> None:
        self.features = features
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget all pictures."""
        self.generated = GaussianMoments()
        self.halves = (GaussianMoments(), GaussianMoments())

    def update(self, images: Tensor, batch: Batch) -> None:
        """Add generated pictures and the real ones of ``batch["image"]``."""
        self.generated.update(self.features.image_features(images))
        real = self.features.image_features(batch["image"])
        # by the name of the sample, so that any split over processes makes the same halves
        odd = torch.tensor([zlib.crc32(key.encode()) % 2 == 1 for key in batch["key"]])
        for half, mine in zip(self.halves, (~odd, odd), strict=True):
            if mine.any():
                half.update(real[mine.to(real.device)])

    def sync(self, all_reduce: AllReduce) -> None:
        """Add up over processes."""
        for moments in (self.generated, *self.halves):
            moments.sync(all_reduce)

    def compute(self) -> dict[str, float]:
        """Return the distance and its floor."""
        if not self.generated.count:
            return {}
        values = {self.name: frechet_distance(self.generated, self.halves[0].merge(self.halves[1]))}
        if min(half.count for half in self.halves) >= 2:
            values[f"{self.name}_floor"] = frechet_distance(*self.halves)
        return values
