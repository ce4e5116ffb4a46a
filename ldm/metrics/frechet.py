"""The Fréchet distance between two sets of images, as Gaussians of their features.

Heusel et al. 2017 (arXiv:1706.08500), Eq. 6: with means m and covariances C,
d^2 = |m_1 - m_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)). The value falls with the number of images and
with the features used: compare values of equal number and features only, and against the floor.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata
from ldm.metrics.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the squared Fréchet distance between two Gaussians.

    With C = R R^T, Tr (C_1 C_2)^(1/2) is the sum of the singular values of R_1^T R_2: no complex numbers, no
    iteration that may fail, and no root of a rounding error where there are fewer images than features.

    Raises:
        ValueError: If their widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"the Fréchet distance got features of widths {len(a.mean)} and {len(b.mean)}, expected equal"
        )
    overlap = torch.linalg.svdvals(_root(a).T @ _root(b)).sum()
    traces = a.covariance.trace() + b.covariance.trace()
    return max(0.0, float((a.mean - b.mean).square().sum() + traces - 2.0 * overlap))


def _root(gaussian: Gaussian) -> Tensor:
    """Return R (F, rank) with R R^T the covariance; what is nothing but rounding is left out."""
    values, vectors = torch.linalg.eigh(gaussian.covariance)
    kept = values > values[-1].clamp_min(0.0) * len(values) * torch.finfo(torch.float64).eps
    if gaussian.count:  # count images span at most so many dimensions
        kept[: max(0, len(values) - (gaussian.count - 1))] = False
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


class Frechet(Measure):
    """Fréchet distance: FID on Inception's ``features``, sFID on its ``spatial`` view.

    Also reports the floor: the distance between two halves of the real images. A generator whose
    value is near the floor cannot be told from the data. (Halves have half the images: the floor is high
    rather than low.)

    Args:
        view: ``features``, ``spatial`` or ``embedding``.
        name: Name of the value; the floor is ``<name>_floor``.
    """

    def __init__(self, view: str = "features", name: str = "fid") -> None:
        self.view = view
        self.name = name
        self.higher_is_better = {name: False}
        self.generated = self.real = FeatureSpec(moments=frozenset({view}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return the distance, and its floor if the real images are known in halves."""
        a, b = generated.gaussian(self.view), real.gaussian(self.view)
        self._warn_if_few(a, "generated")
        self._warn_if_few(b, "real")
        values = {self.name: frechet_distance(a, b)}
        halves = real.splits(self.view)
        if len(halves) == 2:
            values[f"{self.name}_floor"] = frechet_distance(*halves)
        return values

    def metadata(self) -> Metadata:
        """Name the view."""
        return {"view": self.view}

    def _warn_if_few(self, gaussian: Gaussian, which: str) -> None:
        width = len(gaussian.mean)
        if 0 < gaussian.count <= width:
            warnings.warn(
                f"{self.name}: {gaussian.count} {which} images for a covariance of rank {width}: take more "
                f"than {width}, or compare with values of equally many images only",
                stacklevel=2,
            )
