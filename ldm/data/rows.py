"""Rows of shards that are used, in groups: those that a filter keeps, or the buckets of images of one shape.

How many each shard has is known before the first step, and kept, so that a later start reads one file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.index import Summary
from ldm.data.metadata import Kind, metadata
from ldm.data.table import table_path
from ldm.io.atomic import replacing

_KEEP = 256
"""Shards whose rows a process keeps in memory: 40 KB for 10,000 samples."""


class Grouping(Protocol):
    """Assigns samples to groups by their metadata."""

    @property
    def columns(self) -> Mapping[str, Kind]:
        """What it reads, see ``ldm.data.metadata.metadata``."""

    @property
    def num_groups(self) -> int:
        """G."""

    @property
    def identity(self) -> str:
        """Text that changes whenever the assignment does."""

    def groups(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the group of each of N samples: (N,) int in [0, G), or -1 for one that is left out.

        Args:
            columns: (N,) values of each column.
        """


@dataclass(frozen=True)
class Counts:
    """How many samples of S shards are in each of G groups.

    Args:
        groups: (S, G) int64.
        lacking: (C,) int64, samples without each of the columns.
        total: Samples, in groups or not.
    """

    groups: np.ndarray
    lacking: np.ndarray
    total: int


class Rows:
    """Finds the rows of a group in a shard.

    Args:
        summaries: S shards.
        index_dir: Folder of their indices; None: that of each shard.
        grouping: Assigns samples to groups; None: all are in one.
        counts: Samples of each shard and group; None: they are counted.
        cache: Where remote shards are staged.
    """

    def __init__(
        self,
        summaries: Sequence[Summary],
        index_dir: str | None,
        grouping: Grouping | None = None,
        counts: Counts | None = None,
        cache: ShardCache = DEFAULT,
    ) -> None:
        self.summaries, self.index_dir, self.grouping = list(summaries), index_dir, grouping
        self.cache = cache
        self._counts = counts or self._counted()
        self._rows: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def counts(self) -> np.ndarray:
        """(S, G) int64."""
        return self._counts.groups

    @property
    def total(self) -> int:
        """Samples of the shards, used or not."""
        return self._counts.total

    @property
    def lacking(self) -> dict[str, int]:
        """Samples without each of the columns that the grouping reads."""
        columns = self.grouping.columns if self.grouping else ()
        return dict(zip(columns, self._counts.lacking.tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Leave rows behind when this travels to another process."""
        return {**self.__dict__, "_rows": OrderedDict()}

    def row(self, shard: int, group: int, k: int) -> int:
        """Return the row of the k-th sample of a group in a shard, in the order of the tar."""
        if self.grouping is None:
            return k
        rows, starts = self._of(shard)
        return int(rows[starts[group] + k])

    def used(self, shard: int) -> np.ndarray:
        """Return the rows of a shard that are used, group after group."""
        return np.arange(self.summaries[shard].count) if self.grouping is None else self._of(shard)[0]

    def without_empty(self) -> Rows:
        """Return these without the shards of which no sample is used; totals stay as they are."""
        used = np.flatnonzero(self.counts.any(axis=1))
        counts = replace(self._counts, groups=self.counts[used])
        return Rows([self.summaries[n] for n in used], self.index_dir, self.grouping, counts, self.cache)

    def _of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a shard, group after group, and where each group begins."""
        if shard not in self._rows:
            groups = self._groups(shard)[0]
            order = np.argsort(groups, kind="stable").astype(np.uint32)
            counts = self.counts[shard]
            self._rows[shard] = order[len(order) - counts.sum() :], np.cumsum(counts) - counts
            if len(self._rows) > _KEEP:
                self._rows.popitem(last=False)
        self._rows.move_to_end(shard)
        return self._rows[shard]

    def _groups(self, shard: int) -> tuple[np.ndarray, list[int]]:
        """Return the group of each sample of a shard, and how many lack each column."""
        assert self.grouping is not None
        columns = metadata(self.summaries[shard], self.index_dir, self.grouping.columns, self.cache)
        lacking = [int(is_missing(values).sum()) for values in columns.values()]
        return self.grouping.groups(columns), lacking

    def _counted(self) -> Counts:
        shards = np.array([summary.count for summary in self.summaries], np.int64)
        if self.grouping is None:
            return Counts(shards[:, None], np.zeros(0, np.int64), int(shards.sum()))
        table = self._table()
        found = _load(table, self.summaries)
        if found is None:
            found = self._count(self.grouping.num_groups)
            with contextlib.suppress(OSError):  # without it the sidecars of all shards are read again
                _save(table, self.summaries, found)
        return found

    def _count(self, num_groups: int) -> Counts:
        def count(shard: int) -> tuple[np.ndarray, list[int]]:
            groups, lacking = self._groups(shard)
            return np.bincount(groups + 1, minlength=num_groups + 1)[1:], lacking

        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            jobs = pool.map(count, range(len(self.summaries)))
            total = len(self.summaries)
            bar = tqdm(jobs, total=total, desc="read metadata", unit=" shards", delay=1.0, leave=False)
            groups, lacking = zip(*bar, strict=True)
        shards = sum(summary.count for summary in self.summaries)
        return Counts(np.array(groups, np.int64), np.array(lacking, np.int64).sum(axis=0), shards)

    def _table(self) -> Path:
        """Return where the counts are kept: with the indices, by a name of its own per list and grouping."""
        assert self.grouping is not None
        kinds = {name: kind.__name__ for name, kind in self.grouping.columns.items()}
        of = hashlib.sha256(f"{self.grouping.identity} {kinds}".encode()).hexdigest()[:16]
        shards = table_path([summary.path for summary in self.summaries], self.index_dir, self.cache)
        return shards.with_name(f"{shards.stem}-rows-{of}.npz")


def is_missing(values: np.ndarray) -> np.ndarray:
    """Whether each sample lacks a column: (N,) bool."""
    return np.isnan(values) if values.dtype == np.float64 else values == ""


def _states(summaries: Sequence[Summary]) -> np.ndarray:
    return np.array([(s.size, s.mtime_ns, s.count) for s in summaries], np.int64)


def _save(table: Path, summaries: Sequence[Summary], counts: Counts) -> None:
    with replacing(table) as temporary, temporary.open("wb") as file:
        np.savez(file, shards=_states(summaries), groups=counts.groups, lacking=counts.lacking)


def _load(table: Path, summaries: Sequence[Summary]) -> Counts | None:
    """Return the counts that are kept; None if there are none, or a shard changed since."""
    try:
        with np.load(table, allow_pickle=False) as arrays:
            is_same = np.array_equal(arrays["shards"], _states(summaries))
            total = int(arrays["shards"][:, 2].sum())
            return Counts(arrays["groups"], arrays["lacking"], total) if is_same else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
