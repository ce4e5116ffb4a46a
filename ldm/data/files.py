"""Random access to the samples of many shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from io import FileIO
from typing import Any

from ldm.data.decode import SampleId
from ldm.data.fields import Sample, decode_sample, whitelist
from ldm.data.index import Index, Summary, load_index

_KEEP_OPEN = 64


class ShardFiles:
    """Reads members of samples by (shard, row). Files are opened on first use, in each process its own.

    Args:
        summaries: The shards.
        index_dir: Folder of their indices; None: beside each shard.
    """

    def __init__(self, summaries: Sequence[Summary], index_dir: str | None) -> None:
        self.summaries = list(summaries)
        self.index_dir = index_dir
        self._open: OrderedDict[int, tuple[FileIO, Index]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind when this travels to another process."""
        return {**self.__dict__, "_open": OrderedDict()}

    def members(self, shard: int, row: int, names: Iterable[str]) -> tuple[dict[str, bytes], SampleId]:
        """Read those of the members ``names`` that a sample has.

        Raises:
            ValueError: If the shard changed since it was summarized, or ends early.
        """
        file, index = self._opened(shard)
        found = {}
        for name, offset, size in index.spans(row, names):
            found[name] = os.pread(file.fileno(), size, offset)
            if len(found[name]) != size:
                raise _changed(self.summaries[shard].path)
        return found, SampleId(self.summaries[shard].path, index.key(row))

    def sample(
        self, shard: int, row: int, fields: Sequence[str], image_size: int, draw: int | None
    ) -> Sample:
        """Read and decode a sample, see ``decode_sample``.

        Raises:
            BadSample: If it cannot be used.
        """
        members, sample = self.members(shard, row, whitelist(fields))
        return decode_sample(members, sample, fields, image_size, draw)

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
