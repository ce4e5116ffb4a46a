"""Features of a set of images: sums, and rows in the order of the images' indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from ldm.distributed.group import Group
from ldm.metrics.metric import Metadata
from ldm.metrics.moments import Gaussian, GaussianMoments
from ldm.types import Batch, fitting


class Extractor(nn.Module, ABC):
    """A network that metrics measure with. It gives one or more views of an image, all in one pass.

    Views: ``features`` (B, F), what distances are taken of; ``spatial`` (B, F'), which keeps places;
    ``logits`` (B, K) of a classifier; ``embedding`` and ``text`` (B, E), unit vectors of an image and of its
    caption in one space; ``agreement`` (B, 1), their cosine, negative ones taken for 0; ``caption`` (B,)
    int64, equal for equal captions.

    Args:
        name: Short name; values are called ``<measure>/<name>``.
        views: What it can give.
    """

    context_length: int | None = None
    """Most tokens of a caption that are read; None if none is."""
    image_channels: int = 3
    """Channels of the images that it takes."""

    def __init__(self, name: str, views: Iterable[str]) -> None:
        super().__init__()
        self.name = name
        self.views = frozenset(views)
        self._here: Tensor
        self.register_buffer("_here", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of its images: parameters of frozen networks are not its own."""
        return self._here.device

    @abstractmethod
    def forward(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Compute features of images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            batch: The samples they belong to.
            views: Views to compute.
        """

    def look(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Compute features of images of any kind: grey is repeated, others that do not fit are an error."""
        found: dict[str, Tensor] = self(fitting(images, self, self.name), batch, views)
        return found

    @abstractmethod
    def metadata(self) -> Metadata:
        """Return metadata: implementation, SHA-256 of the weights, and how images are resized."""


@dataclass(frozen=True)
class FeatureSpec:
    """Views of the features to keep of a set of images.

    Args:
        moments: Views of which mean and covariance are kept.
        rows: Views that are kept as they are.
    """

    moments: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()

    def __or__(self, other: FeatureSpec) -> FeatureSpec:
        """Keep what either keeps."""
        return FeatureSpec(self.moments | other.moments, self.rows | other.rows)

    @property
    def views(self) -> frozenset[str]:
        """Views that an extractor must compute."""
        return self.moments | self.rows


class FeatureSet:
    """Features of a set of images, reduced to those that measures need.

    Args:
        needs: Views to keep.
        num_splits: Image i belongs to split i modulo ``num_splits``, each with its own moments.
        max_rows: Rows are kept of the first so many images only: the bound of memory.
    """

    def __init__(self, needs: FeatureSpec, num_splits: int = 1, max_rows: int = 50_000) -> None:
        self.needs = needs
        self.max_rows = max_rows
        self.count = 0
        self.device = torch.device("cpu")
        self.moments = {
            view: [GaussianMoments() for _ in range(num_splits)] for view in sorted(needs.moments)
        }
        self.gaussians: dict[str, Gaussian] = {}
        self._rows: dict[str, list[Tensor]] = {view: [] for view in sorted(needs.rows)}
        self._indices: list[Tensor] = []

    def add(self, features: dict[str, Tensor], indices: Tensor) -> None:
        """Add images.

        Args:
            features: (B, F) for each view.
            indices: (B,) int64, indices of the images in the set.
        """
        indices = indices.cpu()
        self.count += len(indices)
        for view, splits in self.moments.items():
            values = features[view].detach().cpu().double()
            for number, split in enumerate(splits):
                mine = indices % len(splits) == number
                if mine.any():
                    split.update(values[mine])
        kept = indices < self.max_rows
        self._indices.append(indices[kept])
        for view, rows in self._rows.items():
            rows.append(_storable(features[view])[kept])

    def sync(self, group: Group) -> None:
        """Add up over processes; rows come to the first process alone."""
        self.count = int(group.all_reduce(torch.tensor(self.count)))
        for splits in self.moments.values():
            for split in splits:
                split.sync(group)
        if self._rows:
            indices = group.gather(_joined(self._indices, torch.int64))
            order = indices.argsort()
            self._indices = [indices[order]]
            for view, rows in self._rows.items():
                self._rows[view] = [group.gather(_joined(rows, torch.float32))[order]]

    def gaussian(self, view: str) -> Gaussian:
        """Return mean and covariance of a view."""
        if view in self.gaussians:
            return self.gaussians[view]
        return reduce(GaussianMoments.merge, self.moments[view]).gaussian

    def mean(self, view: str) -> Tensor:
        """Return the mean (F,) of a view whose moments are kept; NaN without images."""
        return reduce(GaussianMoments.merge, self.moments[view]).mean

    def splits(self, view: str) -> list[Gaussian]:
        """Return mean and covariance of each split; none if one has too few images for them."""
        splits = self.moments.get(view, [])
        return [split.gaussian for split in splits] if all(split.count > 1 for split in splits) else []

    def rows(self, view: str) -> Tensor:
        """Return a view's rows (N, F) in the order of their indices, in float64 or int64; after ``sync``."""
        rows = _joined(self._rows[view], torch.float32).to(self.device)
        return rows.double() if rows.is_floating_point() else rows

    def state(self) -> dict[str, Tensor]:
        """Return all of it as tensors, for a file."""
        state = {"count": torch.tensor(self.count), "indices": _joined(self._indices, torch.int64)}
        for view, splits in self.moments.items():
            for i, split in enumerate(splits):
                state |= {f"{view}.{i}.count": torch.tensor(split.count)}
                state |= {f"{view}.{i}.sum": split.sum, f"{view}.{i}.outer": split.outer}
        return state | {f"{view}.rows": _joined(rows, torch.float32) for view, rows in self._rows.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what ``state`` returned of a set with the same needs."""
        self.count, self._indices = int(state["count"]), [state["indices"]]
        for view, splits in self.moments.items():
            for i, split in enumerate(splits):
                split.count = int(state[f"{view}.{i}.count"])
                split.sum, split.outer = state[f"{view}.{i}.sum"], state[f"{view}.{i}.outer"]
        self._rows = {view: [state[f"{view}.rows"]] for view in self._rows}


def _storable(rows: Tensor) -> Tensor:
    rows = rows.detach().cpu()
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_floating_point() else rows


def _joined(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, dtype=dtype)
