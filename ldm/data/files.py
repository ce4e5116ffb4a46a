"""Random access to the samples of many shards."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from typing import Any

from torch import distributed

from ldm.data.decode import SampleId
from ldm.data.fields import Sample, decode_sample, whitelist
from ldm.data.index import Index, Summary, load_index
from ldm.data.view import View

_KEEP_OPEN = 64


class ShardFiles:
    """Reads members of samples by (shard, row). Files are opened on first use, in each process its own.

    Args:
        summaries: The shards.
        index_dir: Folder of their indices; None: that of each shard.
    """

    def __init__(self, summaries: Sequence[Summary], index_dir: str | None) -> None:
        self.summaries = list(summaries)
        self.index_dir = index_dir
        self._open: OrderedDict[int, tuple[FileIO, Index]] = OrderedDict()

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
            found[name] = os.pread(file.fileno(), size, offset)
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
        index = self._opened(shard)[1]
        columns = [index.members.index(name) for name in names]
        return index.key(int((index.offsets[:, columns] < 0).all(axis=1).argmax()))

    def sample(
        self,
        shard: int,
        row: int,
        fields: Sequence[str],
        view: View,
        optional: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
    ) -> Sample:
        """Read and decode a sample, see ``decode_sample``.

        Raises:
            BadSample: If it cannot be used.
        """
        members, sample = self.members(shard, row, whitelist((*fields, *optional), view.flip))
        decoded = decode_sample(members, sample, fields, view, optional, classes or {})
        return {**decoded, "key": self.key(shard, row)}

    def _opened(self, shard: int) -> tuple[FileIO, Index]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        summary = self.summaries[shard]
        index = load_index(summary.path, self.index_dir)
        file = FileIO(summary.path)
        if os.fstat(file.fileno()).st_size != summary.size or len(index) != summary.count:
            raise _changed(summary.path)
        self._open[shard] = (file, index)
        if len(self._open) > _KEEP_OPEN:
            self._open.popitem(last=False)
        return self._open[shard]


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
