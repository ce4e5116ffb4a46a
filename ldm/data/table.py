"""Table of the summaries of all shards, so that one process alone reads every index.

Five hundred processes that open a hundred thousand indices each would keep a file system's metadata server
busy for longer than the first epoch takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import distributed

from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.fields import whitelist
from ldm.data.index import Summary, summarize_all
from ldm.data.remote import is_remote
from ldm.data.sidecar import full_name
from ldm.io.atomic import write_text


def summarize_shared(
    paths: Sequence[str], index_dir: str | None, cache: ShardCache = DEFAULT
) -> list[Summary]:
    """Summarize shards: the first process from their indices, the others from the table that it wrote.

    The first one must have been called before, as the data module's ``prepare_data`` is. If the table
    cannot be written or read, every process reads every index. A shard that changed meanwhile is noticed when
    it is opened.

    Args:
        paths: The shards.
        index_dir: Folder of their indices; None: that of each shard, or that of the cache.
        cache: Where remote shards are staged.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return summarize_all(paths, index_dir, cache)
    table = table_path(paths, index_dir, cache)
    if distributed.get_rank() > 0 and (found := read(table, paths)) is not None:
        return found
    summaries = summarize_all(paths, index_dir, cache)
    if distributed.get_rank() == 0:
        write(table, summaries)
    return summaries


def table_path(paths: Sequence[str], index_dir: str | None, cache: ShardCache = DEFAULT) -> Path:
    """Return where the table of these shards lies: with their indices, by a name of its own per list."""
    names = "\n".join(map(full_name, paths))
    own = cache.index_dir if is_remote(paths[0]) else Path(paths[0]).parent
    folder = Path(index_dir or own)
    return folder / f".shards-{hashlib.sha256(names.encode()).hexdigest()[:16]}.json"


def write(table: Path, summaries: Sequence[Summary]) -> None:
    """Write the table, by rename; where that is forbidden there is none."""
    with contextlib.suppress(OSError):
        write_text(table, json.dumps([vars(summary) for summary in summaries]))


def read(table: Path, paths: Sequence[str]) -> list[Summary] | None:
    """Return the summaries of ``paths``, or None if there is no table of them, or none of this version."""
    try:
        found = [Summary.from_json(summary) for summary in json.loads(table.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_same = [s.path for s in found] == list(paths) and all(tuple(s.present) == whitelist() for s in found)
    return found if is_same else None
