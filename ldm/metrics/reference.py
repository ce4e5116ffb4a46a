"""Statistics of real images: from batches, a cache, or a published file."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.io.atomic import replacing
from ldm.io.images import from_bytes
from ldm.io.weights import sha256
from ldm.metrics.features import Extractor, FeatureSet
from ldm.metrics.metric import ReferenceInfo
from ldm.metrics.moments import Gaussian
from ldm.types import Batch

Arrays = dict[str, NDArray[Any]]
SUFFIX = {"features": "", "spatial": "_s"}
"""Suffixes of mu and sigma in a file of statistics."""
BATCH_SIZE = 50


class Reference(ABC):
    """Statistics of the real images.

    Attributes:
        name: Their name in records: a hash.
    """

    name: str = "unknown"

    @abstractmethod
    def find(self, real: FeatureSet, extractor: Extractor, info: ReferenceInfo) -> bool:
        """Fill ``real`` if the statistics are known already; called on the first process."""

    def keep(self, real: FeatureSet) -> None:
        """Keep complete statistics for the next evaluation; called on the first process."""
        return None

    def check(self, size: int | None) -> None:
        """Check the side of the images that are compared with them, if both sides are known.

        Raises:
            ValueError: If they differ.
        """
        return None


class FromBatches(Reference):
    """Those of the batches of the first evaluation, kept in memory and in a cache on disk."""

    def __init__(self) -> None:
        self._kept: tuple[str, dict[str, torch.Tensor]] | None = None
        self._key = ""
        self._path: Path | None = None

    def find(self, real: FeatureSet, extractor: Extractor, info: ReferenceInfo) -> bool:
        """Search memory, then the cache, by a hash of images, network and views."""
        self.name, self._key, self._path = "unknown", "", None
        if info.identity is None:
            return False
        self.name = info.fingerprint or hashlib.sha256(info.identity.encode()).hexdigest()
        kept = [sorted(real.needs.moments), sorted(real.needs.rows), real.max_rows]
        question = json.dumps([info.identity, extractor.metadata(), kept], sort_keys=True)
        self._key = hashlib.sha256(question.encode()).hexdigest()
        self._path = info.cache / f"{self._key}.npz" if info.cache else None
        if self._kept and self._kept[0] == self._key:
            real.load(self._kept[1])
            return True
        return self._path is not None and self._path.is_file() and self._read(self._path, real)

    def keep(self, real: FeatureSet) -> None:
        """Keep what has an identity."""
        if not self._key:
            return
        self._kept = (self._key, real.state())
        if self._path is None:
            return
        try:
            write_arrays(self._path, {name: value.numpy() for name, value in self._kept[1].items()})
        except OSError as error:  # a full disk, a folder that is not ours
            warnings.warn(f"statistics of real images are not kept in {self._path}: {error}", stacklevel=2)

    def _read(self, path: Path, real: FeatureSet) -> bool:
        try:
            with np.load(path, allow_pickle=False) as file:
                state = {name: torch.from_numpy(file[name]) for name in file.files}
            real.load(state)
        except Exception as error:  # a cache may always be thrown away
            warnings.warn(f"statistics of real images in {path} are computed anew: {error}", stacklevel=2)
            return False
        self._kept = (self._key, state)
        return True


class FromFile(Reference):
    """Those of a file as ADM's evaluation reads and writes (Dhariwal & Nichol 2021).

    ``mu`` and ``sigma`` are of Inception's ``features``, ``mu_s`` and ``sigma_s`` of its ``spatial`` view;
    ``arr_0`` are images (N, H, W, 3) uint8, from which the extractor computes what else is needed. Where a
    file says which network its statistics are of (``record``, as ours do), it must be the same.

    Args:
        path: The .npz file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.size: int | None = None
        self._kept: tuple[str, dict[str, torch.Tensor], dict[str, Gaussian]] | None = None
        if not Path(path).is_file():
            raise FileNotFoundError(f"statistics '{path}' do not exist")

    def find(self, real: FeatureSet, extractor: Extractor, info: ReferenceInfo) -> bool:
        """Read the file, at the first time.

        Raises:
            ValueError: If it is of another network, or lacks what is needed.
        """
        self.name = sha256(self.path)
        if self._kept is None or self._kept[0] != self.name:
            self._fill(real, extractor)
            self._kept = (self.name, real.state(), real.gaussians)
        real.load(self._kept[1])
        real.gaussians = self._kept[2]
        return True

    def check(self, size: int | None) -> None:
        """Compare with the side of ``arr_0``, or with the one that the file has recorded."""
        if size is not None and self.size not in (None, size):
            raise ValueError(f"'{self.path}' is of images of side {self.size}, got images of side {size}")

    def _fill(self, real: FeatureSet, extractor: Extractor) -> None:
        names = array_names(self.path)
        with np.load(self.path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names}
        record = json.loads(str(arrays["record"])) if "record" in arrays else {}
        self._check(record, extractor)
        images = arrays.get("arr_0")
        self.size = images.shape[1] if images is not None else record.get("size")
        real.gaussians = _gaussians(arrays, real, int(record.get("num", 0)))
        lacking = sorted((real.needs.moments - real.gaussians.keys()) | real.needs.rows)
        if lacking:
            if images is None:
                raise ValueError(
                    f"'{self.path}' has {sorted(arrays)}, expected 'arr_0' for the views {lacking}"
                )
            _look(images, real, extractor)
            real.gaussians = _gaussians(arrays, real, int(record.get("num", 0)))
        real.count = real.count or int(record.get("num", 0))

    def _check(self, record: dict[str, Any], extractor: Extractor) -> None:
        mine = extractor.metadata()
        for key in ("weights_sha256", "resize"):
            if key in record and record[key] != mine.get(key):
                raise ValueError(
                    f"'{self.path}' is of a network with {key} {record[key]!s:.40}, but "
                    f"{extractor.name} has {mine.get(key)!s:.40}"
                )


def array_names(path: str) -> list[str]:
    """List what an .npz file holds.

    Raises:
        ValueError: If it is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file.files)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"'{path}' is no .npz of arrays: {reason:.200}") from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write an .npz file atomically; its folder is made."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _gaussians(arrays: Arrays, real: FeatureSet, count: int) -> dict[str, Gaussian]:
    found = {}
    for view in real.needs.moments:
        names = (f"mu{SUFFIX[view]}", f"sigma{SUFFIX[view]}") if view in SUFFIX else ()
        if names and all(name in arrays for name in names):
            mean, covariance = (torch.from_numpy(arrays[name]).double() for name in names)
            found[view] = Gaussian(mean, covariance, count)
    return found


def _look(images: NDArray[Any], real: FeatureSet, extractor: Extractor) -> None:
    """Pass images (N, H, W, 3) uint8 through the extractor."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"arr_0 is {images.dtype} {images.shape}, expected uint8 images (N, H, W, 3)")
    views = real.needs.views
    for start in range(0, len(images), BATCH_SIZE):
        chunk = torch.from_numpy(images[start : start + BATCH_SIZE]).permute(0, 3, 1, 2).to(extractor.device)
        batch: Batch = {"key": [str(start + i) for i in range(len(chunk))]}
        with torch.no_grad():
            seen = extractor.look(from_bytes(chunk), batch, views)
        real.add(seen, torch.arange(start, start + len(chunk)))
