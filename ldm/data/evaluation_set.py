"""Samples in a fixed order, each once: what validation, evaluation and requests of shards read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from ldm.data.fields import FIELDS, Sample
from ldm.data.files import ShardFiles
from ldm.data.index import fingerprint
from ldm.data.raster import DECODER
from ldm.data.rows import Rows
from ldm.data.shard_file import peeking
from ldm.data.source import AHEAD, MAX_BAD, DataRank, first_usable, make_loader
from ldm.data.stacking import NO_SLOTS, Slots, read_batch
from ldm.data.view import View
from ldm.types import RGB8, ImageKind


class EvaluationSet(Dataset[Sample]):
    """Samples in the order of their shards, each once.

    A bad sample keeps its position and its key, and so its random numbers, but shows the next good one.

    Args:
        files: The shards.
        fields: Names of the fields that each sample must give; captions are the canonical ones.
        image_size: Side of the images in pixels.
        optional: Further fields, which a sample may lack.
        classes: Number of classes of the fields that hold some: a sample with others is a bad one.
        rows: Which rows of the shards are used; None uses all.
        kind: Channels and bits of the images.
    """

    def __init__(
        self,
        files: ShardFiles,
        fields: Sequence[str],
        image_size: int,
        optional: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        rows: Rows | None = None,
        kind: ImageKind = RGB8,
    ) -> None:
        self.files, self.rows = files, rows or Rows(files.summaries, files.index_dir, cache=files.cache)
        files.is_sequential = True
        self.required, self.optional = tuple(fields), tuple(optional)
        self.image_size, self.kind, self.classes = image_size, kind, dict(classes or {})
        self.ends = np.cumsum(self.rows.counts[:, 0])

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of all fields that are read, in the order of the table."""
        return tuple(name for name in FIELDS if name in (*self.required, *self.optional))

    @property
    def filter(self) -> str | None:
        """Expression that its samples fulfil; None if all are used."""
        return None if self.rows.grouping is None else self.rows.grouping.identity

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprint(self, num: int) -> str:
        """Hash which images the first ``num`` are: shards by name, size, count, filter, side, kind, decoder.

        The same wherever the shards lie.
        """
        what: list[Any] = [fingerprint(self.files.summaries), self.image_size, min(num, len(self)), DECODER]
        what += [] if self.filter is None else [self.filter]
        what += [] if self.kind == RGB8 else [asdict(self.kind)]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def identity(self, num: int) -> str:
        """Return text that changes when the first ``num`` images do, or when shards are written anew."""
        return f"{self.fingerprint(num)} {[summary.mtime_ns for summary in self.files.summaries]}"

    def __getitem__(self, position: int, slots: Slots = NO_SLOTS) -> Sample:
        """Return the sample at a position in [0, len).

        Args:
            position: The position.
            slots: Memory that its values may be decoded into.

        Raises:
            ValueError: If ``MAX_BAD`` samples in a row cannot be used.
        """
        tried = [n % len(self) for n in range(position, position + MAX_BAD)]
        sample = first_usable(partial(self._read, slots=slots), tried)
        return {**sample, "key": self.files.key(*self._locate(position))} if "skipped" in sample else sample

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """Return the samples of a batch."""
        return read_batch(self.__getitem__, positions)

    def check(self, option: str) -> list[Sample]:
        """Return a usable sample of each shard, or of a hundred shards.

        Raises:
            ValueError: If none of the first ``MAX_BAD`` samples of a shard can be used.
        """
        found = []
        for shard in range(0, len(self.ends), -(-len(self.ends) // 100)):
            start = int(self.ends[shard] - self.rows.counts[shard, 0])
            try:
                with peeking():
                    found.append(first_usable(self._read, range(start, int(self.ends[shard]))[:MAX_BAD]))
            except ValueError as error:
                raise ValueError(f"{option}: {' and '.join(self.required)} are read, but {error}") from error
        return found

    def _locate(self, position: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, position, side="right"))
        k = position - int(self.ends[shard] - self.rows.counts[shard, 0])
        return shard, self.rows.row(shard, 0, k)

    def _read(self, position: int, slots: Slots = NO_SLOTS) -> Sample:
        shard, row = self._locate(position)
        self.files.prefetch(shard, lambda: ([shard], range(shard + 1, len(self.ends))[:AHEAD]))
        view = View(self.image_size, self.image_size, kind=self.kind)
        return self.files.sample(shard, row, self.required, view, self.optional, self.classes, slots)

    def loader(self, batch_size: int, num_workers: int, process: DataRank) -> DataLoader[Sample]:
        """Make the loader of one process.

        Rank r of w reads positions r, r + w, ...: each sample once over all ranks, no padding. All ranks get
        the same number of batches (of sizes that differ by one at most, so up to batch_size + 1), because a
        model under DDP synchronises its buffers on every forward pass.
        """
        positions = np.arange(process.rank, len(self), process.world_size)
        num_batches = max(1, -(-(len(self) // process.world_size) // batch_size))
        batches = [batch.tolist() for batch in np.array_split(positions, num_batches)]
        return make_loader(self, batches, batch_size, num_workers, process, persistent=True)
