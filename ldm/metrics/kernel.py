"""Maximum mean discrepancies: distances of two sets by a kernel, without assuming Gaussians.

Gretton et al. 2012 (JMLR 13), Eqs. 3 and 5: MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata

BLOCK = 8192
"""Rows of a kernel matrix held at once."""


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute (x y / F + 1)^3, (N, M), of rows (N, F) and (M, F): Bińkowski et al. 2018, sec. 3.1."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def unbiased_mmd2(x: Tensor, y: Tensor) -> float:
    """Estimate MMD^2 with the polynomial kernel without bias, so that it may be negative.

    Args:
        x: (N, F) float64.
        y: (M, F) float64.
    """
    n, m = len(x), len(y)
    xx, yy, xy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2.0 * xy.mean())


class KID(Measure):
    """Kernel Inception distance (Bińkowski et al. 2018, arXiv:1801.01401): averaged over subsets.

    The subsets are those of torch-fidelity for the same seed, and a function of the images' places alone.

    Args:
        num_subsets: Subsets that are averaged.
        subset_size: Images of each side in a subset, at most all.
        seed: Seed of the subsets.
    """

    def __init__(self, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> None:
        self.higher_is_better = {"kid": False}
        self.num_subsets = num_subsets
        self.subset_size = self._drawn = subset_size
        self.seed = seed
        self.generated = self.real = FeatureSpec(rows=frozenset({"features"}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``kid`` and ``kid_std``, the deviation over subsets."""
        x, y = generated.rows("features"), real.rows("features")
        size = min(self.subset_size, len(x), len(y))
        if size < 2:
            raise ValueError(
                f"kid: got {len(x)} generated and {len(y)} real images, expected at least 2 each"
            )
        self._drawn = size
        draw = np.random.RandomState(self.seed)
        values = []
        for _ in range(self.num_subsets):
            one = torch.from_numpy(draw.choice(len(x), size, replace=False)).to(x.device)
            other = torch.from_numpy(draw.choice(len(y), size, replace=False)).to(y.device)
            values.append(unbiased_mmd2(x[one], y[other]))
        return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}

    def metadata(self) -> Metadata:
        """Name the subsets, as they were drawn last."""
        return {"subsets": self.num_subsets, "subset_size": self._drawn, "seed_of_subsets": self.seed}


class CMMD(Measure):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, arXiv:2401.09603), sec. 4, times 1000.

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) on unit vectors, all pairs counted, an image with itself too: the
    estimator of the authors' program. Comparable with theirs on their network only, ViT-L/14 at 336 pixels.

    Args:
        sigma: Width of the kernel.
    """

    def __init__(self, sigma: float = 10.0) -> None:
        self.higher_is_better = {"cmmd": False}
        self.sigma = sigma
        self.generated = self.real = FeatureSpec(rows=frozenset({"embedding"}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``cmmd``."""
        x, y = generated.rows("embedding"), real.rows("embedding")
        if not len(x) or not len(y):
            raise ValueError(f"cmmd: got {len(x)} generated and {len(y)} real images, expected some of each")
        distance = self._gap(x, x) + self._gap(y, y) - 2.0 * self._gap(x, y)
        return {"cmmd": 1000.0 * distance}

    def metadata(self) -> Metadata:
        """Name the kernel's width."""
        return {"sigma": self.sigma}

    def _gap(self, x: Tensor, y: Tensor) -> float:
        """Return the mean of k - 1: near one k would lose the digits that its differences consist of."""
        squares = y.square().sum(1)
        sums = [
            torch.expm1(
                (block.square().sum(1, keepdim=True) + squares - 2.0 * block @ y.T).clamp_min(0.0)
                / (-2.0 * self.sigma**2)
            ).sum()
            for block in x.split(BLOCK)
        ]
        return math.fsum(float(total) for total in sums) / (len(x) * len(y))
