"""Random access to the samples of many shards."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import distributed

from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.decode import SampleId
from ldm.data.fields import Sample, decode_sample, whitelist
from ldm.data.index import Index, Summary, confirm, load_index
from ldm.data.prefetch import Prefetcher
from ldm.data.remote import is_remote
from ldm.data.shard_file import Ranges, ShardFile, is_peeking
from ldm.data.stacking import NO_SLOTS, Slots
from ldm.data.view import View

_KEEP_OPEN = 64


class ShardFiles:
    """Reads members of samples by (shard, row). Files are opened on first use, in each process its own.

    Args:
        summaries: The shards.
        index_dir: Folder of their indices; None: that of each shard, or that of the cache.
        cache: Where remote shards are staged.
    """

    def __init__(
        self, summaries: Sequence[Summary], index_dir: str | None, cache: ShardCache = DEFAULT
    ) -> None:
        self.summaries = list(summaries)
        self.index_dir, self.cache = index_dir, cache
        self.share = 1.0
        """Part of the cache that these shards may take; several sets that are read together have one each."""
        self.is_sequential = False
        """Whether they are read from front to back: then only the last one stays open."""
        self._open: OrderedDict[int, tuple[ShardFile, Index]] = OrderedDict()
        self._prefetcher = Prefetcher(partial(_is_staged, self.cache, self.summaries))

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when this travels to another process."""
        return {**self.__dict__, "_open": OrderedDict()}

    def members(
        self, shard: int, row: int, names: Iterable[str], limit: int | None = None
    ) -> tuple[dict[str, bytes], SampleId]:
        """Read those of the members ``names`` that a sample has, at most ``limit`` bytes of each.

        Raises:
            ValueError: If the shard changed since it was summarized, or ends early.
        """
        file, index = self._opened(shard)
        found = {}
        for name, offset, stored in index.spans(row, names):
            size = stored if limit is None else min(stored, limit)
            found[name] = file.pread(size, offset)
            if len(found[name]) != size:
                raise _changed(self.summaries[shard].path)
        return found, SampleId(self.summaries[shard].path, index.key(row))

    def key(self, shard: int, row: int) -> str:
        """Return the key of a sample, unique over the shards.

        If an earlier shard has equal keys, it ends with "@" and the number of the shard.
        """
        key = self._opened(shard)[1].key(row)
        return f"{key}@{shard}" if self.summaries[shard].has_repeated_keys else key

    def lacking(self, shard: int, names: Iterable[str]) -> str:
        """Return the key of the first sample that has none of the members ``names``, or else of the first."""
        return self._opened(shard)[1].key(int((~self.having(shard, names)).argmax()))

    def having(self, shard: int, names: Iterable[str]) -> np.ndarray:
        """Return whether each sample of a shard has one of the members ``names``: (N,) bool."""
        index = self._opened(shard)[1]
        columns = [index.members.index(name) for name in names]
        return np.asarray((index.offsets[:, columns] >= 0).any(axis=1))

    def sample(
        self,
        shard: int,
        row: int,
        fields: Sequence[str],
        view: View,
        optional: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        slots: Slots = NO_SLOTS,
    ) -> Sample:
        """Read and decode a sample, see ``decode_sample``.

        Raises:
            BadSample: If it cannot be used.
        """
        members, sample = self.members(shard, row, whitelist((*fields, *optional), view.flip))
        decoded = decode_sample(members, sample, fields, view, optional, classes or {}, slots)
        if self.summaries[shard].has_repeated_keys:
            decoded["key"] = self.key(shard, row)
        return decoded

    def prefetch(self, shard: int, upcoming: Callable[[], tuple[Sequence[int], Sequence[int]]]) -> None:
        """Stage in the background what comes next, if shards are remote.

        Args:
            shard: The one that is read now.
            upcoming: Gives those that are read together with it, and those after them.
        """
        if self._has_remote and not is_peeking():
            self._prefetcher.follow(shard, lambda: self._fitting(*upcoming()))

    @cached_property
    def _has_remote(self) -> bool:
        return any(is_remote(summary.path) for summary in self.summaries)

    def _fitting(self, now: Sequence[int], later: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Leave out shards that would push those that are read now out of the cache."""
        sizes = [self.summaries[n].size for n in (*now, *later)]
        if (together := sum(sizes[: len(now)])) > self._room:
            warnings.warn(
                f"data.reader.init_args.cache_gb: {self.cache.max_bytes / 1e9:.3g}, but {len(now)} shards of "
                f"{together / 1e9:.3g} GB are read together: they are fetched again and again; expected "
                f"{2 * together / self.share / 1e9:.3g}, or a smaller group_shards",
                stacklevel=2,
            )
        ends = np.cumsum(sizes)[len(now) :]
        return now, later[: int((ends <= self._room).sum())]

    @property
    def _room(self) -> int:
        return int(self.share * self.cache.max_bytes)

    def _opened(self, shard: int) -> tuple[ShardFile, Index]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        summary = self.summaries[shard]
        is_local = not is_remote(summary.path)
        index = load_index(summary.path, self.index_dir, self.cache, summary.known_version)
        if not is_local:
            self._close_staged(0 if self.is_sequential else self._room // 2 - summary.size)
        file = self.cache.open(summary.path, summary.version, summary.sha256, self._close_staged)
        if file.size != summary.size or len(index) != summary.count:
            raise _changed(summary.path)
        if isinstance(file, Ranges):
            return file, index
        if not (is_local or summary.sha256):
            confirm(summary, file, self.index_dir, self.cache)
        self._open[shard] = (file, index)
        if len(self._open) > _KEEP_OPEN:
            self._open.popitem(last=False)
        return self._open[shard]

    def _close_staged(self, keep: int = 0) -> None:
        """Close staged shards but for ``keep`` bytes, those first that were not read for longest."""
        sizes = {n: self.summaries[n].size for n in self._open if is_remote(self.summaries[n].path)}
        total = sum(sizes.values())
        for shard, size in sizes.items():
            if total > keep:
                self._open.pop(shard)[0].close()
                total -= size


def _is_staged(cache: ShardCache, summaries: Sequence[Summary], shard: int) -> bool:
    """Stage a shard, if it is remote, unless another process does or no room is left; whether it is there."""
    summary = summaries[shard]
    if not is_remote(summary.path):
        return True
    file = cache.stage(summary.path, summary.version, summary.sha256)
    if file is not None:
        file.close()
    return file is not None


def _changed(path: str) -> ValueError:
    return ValueError(f"{path}: the shard changed while it is being read, expected it to stay as it is")


def usable(summaries: Sequence[Summary], option: str) -> list[Summary]:
    """Leave out empty shards, and warn of what is odd in shards.

    Raises:
        ValueError: If all are empty.
    """
    found = [summary for summary in summaries if summary.count]
    if not found:
        raise ValueError(
            f"{option}: empty shard {summaries[0].path}: found no member at all, expected KEY.jpg, KEY.txt "
            "... (data/README.md)"
        )
    if empty := [summary.path for summary in summaries if not summary.count]:
        warn_once(f"{option}: {len(empty)} of {len(summaries)} shards are empty, e.g. {empty[0]}: left out")
    if losing := [summary for summary in found if summary.lost]:
        warn_once(
            f"{option}: {sum(summary.lost for summary in losing)} members are ignored, e.g. "
            f"{losing[0].lost_example} of {losing[0].path}"
        )
    if repeated := [summary.path for summary in found if summary.has_repeated_keys]:
        warn_once(
            f"{option}: {len(repeated)} of {len(found)} shards have keys of others, e.g. {repeated[0]}: "
            "'@' and the number of the shard make them unique"
        )
    return found


def warn_once(message: str) -> None:
    """Warn, on the first process of several; Python shows equal warnings once."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        warnings.warn(message, stacklevel=2)
