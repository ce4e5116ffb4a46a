"""Fidelity and diversity apart: which images lie among the nearest neighbours of the other kind."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata

BLOCK = 2048
"""Rows of a matrix of distances held at once."""
SAME = 1e-13
"""Squared distance over squared norms below which two float32 vectors are equal: the rest is rounding."""


class Neighbours(Measure):
    """Precision, recall, density and coverage.

    Take around each image the ball that reaches its k-th neighbour of its own kind. Precision is the share
    of generated images in some real one's ball, recall the other way round (Kynkäänniemi et al. 2019,
    arXiv:1904.06991, Eqs. 1 and 2). Density is the mean number of real balls that a generated image lies
    in, over k; coverage the share of real balls with a generated image in them (Naeem et al. 2020,
    arXiv:2002.09797, sec. 3). All of them depend on the number of images.

    Args:
        k: Neighbours for precision and recall.
        k_density: Neighbours for density and coverage.
    """

    def __init__(self, k: int = 3, k_density: int = 5) -> None:
        self.higher_is_better = dict.fromkeys(("precision", "recall", "density", "coverage"), True)
        self.k = k
        self.k_density = k_density
        self.generated = self.real = FeatureSpec(rows=frozenset({"features"}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``precision``, ``recall``, ``density`` and ``coverage``."""
        x, y = generated.rows("features"), real.rows("features")
        needed = max(self.k, self.k_density) + 1
        if min(len(x), len(y)) < needed:
            raise ValueError(
                f"precision: got {len(x)} generated and {len(y)} real images, expected {needed} or more"
            )
        radius_x = _radii(x, (self.k,))[0]
        radius_y, radius_density = _radii(y, (self.k, self.k_density))
        inside = torch.zeros(len(y), dtype=torch.bool, device=x.device)  # real balls with an image in them
        precise, density, nearest = 0, 0, torch.zeros(len(y), dtype=torch.bool, device=x.device)
        for block, radius in zip(x.split(BLOCK), radius_x.split(BLOCK), strict=True):
            gaps = squared_distances(block, y)
            precise += int((gaps <= radius_y).any(1).sum())
            density += int((gaps <= radius_density).sum())
            inside |= (gaps <= radius_density).any(0)
            nearest |= (gaps <= radius[:, None]).any(0)
        return {
            "precision": precise / len(x),
            "recall": float(nearest.double().mean()),
            "density": density / (self.k_density * len(x)),
            "coverage": float(inside.double().mean()),
        }

    def metadata(self) -> Metadata:
        """Name the neighbours."""
        return {"k": self.k, "k_density": self.k_density}


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x_i - y_j|^2, (N, M), of float64 rows; equal rows are at distance zero."""
    norms = x.square().sum(1, keepdim=True) + y.square().sum(1)
    squares = norms - 2.0 * x @ y.T
    return torch.where(squares < SAME * norms, 0.0, squares)


def _radii(x: Tensor, ks: tuple[int, ...]) -> list[Tensor]:
    """Return for each k the squared distance of every row to its k-th neighbour, (N,)."""
    rows = []
    for block in x.split(BLOCK):
        nearest = squared_distances(block, x).topk(max(ks) + 1, largest=False).values  # the first is itself
        rows.append(nearest[:, list(ks)])
    return list(torch.cat(rows).unbind(1))
