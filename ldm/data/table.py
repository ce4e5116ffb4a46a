"""Table of the summaries of all shards, so that one process alone reads every index.

Five hundred processes that open a hundred thousand indices each would keep a file system's metadata server
busy for longer than the first epoch takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import distributed

from ldm.data.fields import whitelist
from ldm.data.index import Summary, summarize_all
from ldm.io.atomic import replacing


def summarize_shared(paths: Sequence[str], index_dir: str | None) -> list[Summary]:
    """Summarize shards: the first process from their indices, the others from what it wrote down.

    The first one must have been called before, as the data module's ``prepare_data`` is. Where the table
    cannot be written or read, everyone looks at every index. A shard that changed meanwhile is noticed when
    it is opened.

    Args:
        paths: The shards.
        index_dir: Folder of their indices; None: beside each shard.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return summarize_all(paths, index_dir)
    table = table_path(paths, index_dir)
    if distributed.get_rank() > 0 and (found := read(table, paths)) is not None:
        return found
    summaries = summarize_all(paths, index_dir)
    if distributed.get_rank() == 0:
        write(table, summaries)
    return summaries


def table_path(paths: Sequence[str], index_dir: str | None) -> Path:
    """Return where the table of these shards lies: with their indices, by a name of its own per list."""
    names = "\n".join(os.path.abspath(path) for path in paths)
    folder = Path(paths[0]).parent if index_dir is None else Path(index_dir)
    return folder / f".shards-{hashlib.sha256(names.encode()).hexdigest()[:16]}.npz"


def write(table: Path, summaries: Sequence[Summary]) -> None:
    """Write the table, by rename; where that is forbidden there is none."""
    names = whitelist()
    rows = [[s.size, s.mtime_ns, s.count, *(s.present[name] for name in names)] for s in summaries]
    with contextlib.suppress(OSError), replacing(table) as temporary, temporary.open("wb") as file:
        np.savez(file, members=np.array(names), rows=np.array(rows, dtype=np.int64))


def read(table: Path, paths: Sequence[str]) -> list[Summary] | None:
    """Return the summaries of ``paths``, or None if there is no table of them, or none of this version."""
    try:
        with np.load(table, allow_pickle=False) as arrays:
            names, rows = tuple(arrays["members"].tolist()), arrays["rows"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if names != whitelist() or len(rows) != len(paths):
        return None
    return [
        Summary(path, size, mtime, count, dict(zip(names, present, strict=True)))
        for path, (size, mtime, count, *present) in zip(paths, rows, strict=True)
    ]
