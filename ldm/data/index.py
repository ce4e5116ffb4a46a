"""Sidecar index of a tar shard: byte offsets of all members, so that any sample is one seek away.

The index is written next to the shard (``000017.tar`` -> ``000017.tar.index.npz``), by rename, or into a
cache of the user if that is read-only, or into a folder of its own. It is rebuilt when size or modification
time of the shard differ from those that it was built for, or the ETag of a remote one. That of a remote shard
is taken from next to it, or built when it is staged, and lies with the staged shards.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.fields import whitelist
from ldm.data.keys import join_twins, overlapping, repeating
from ldm.data.remote import Version, beside, identity, is_remote, shard_name
from ldm.data.shard_file import LocalFile, file_hash
from ldm.data.sidecar import Index, Summary, fetch_index, read_index, read_summary, sidecar, write_index
from ldm.data.tar import INDEX, members, split_name

FIRST_TIME = (
    "remote shards without an index are read once, from front to back: indices next to them "
    "(NAME.tar.index.npz, python -m ldm.data makes them of local shards) save that"
)


def scan(path: str, file: FileIO | None = None) -> Index:
    """Build the index of a tar by reading its headers; it is empty if the tar is.

    Members of a sample need not be adjacent. Members outside the whitelist are ignored.

    Args:
        path: The tar.
        file: The tar, if it is open; it stays so.

    Raises:
        ValueError: If the file is not an intact tar, has members but no sample, or has a member twice.
    """
    names = whitelist()
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    foreign: dict[str, str | None] = {}
    dangling: list[str] = []
    for name, offset, size in members(path, dangling, file):
        key, extension = split_name(name)
        if key is None or extension not in names:
            foreign[name] = key
            continue
        row = rows.setdefault(key, {})
        if extension in row:
            raise ValueError(f"{path}: member '{name}' is there twice, expected unique names")
        row[extension] = (offset, size)
    if not rows and (foreign or dangling):
        raise ValueError(
            f"{path}: empty shard: found only members such as '{[*dangling, *foreign][-1]}', expected "
            "KEY.jpg, KEY.txt ..., no dot in KEY, no links (data/README.md)"
        )
    lost = [f"'{name}' (a link to no member of the tar)" for name in dangling]
    for name, key in foreign.items():
        if key is not None and key not in rows and name.rpartition(".")[2].lower() in names:
            lost.append(f"'{name}' (its key ends at the first dot)")
    join_twins(rows)
    spans = [[row.get(name, (-1, 0)) for name in names] for row in rows.values()]
    table = np.array(spans, dtype=np.int64).reshape(-1, len(names), 2)
    keys = np.array([key.encode() for key in rows], dtype=None if rows else "S1")
    return Index(names, keys, table[:, :, 0], table[:, :, 1], tuple(lost))


def load_index(
    path: str, index_dir: str | None, cache: ShardCache = DEFAULT, version: Version | None = None
) -> Index:
    """Read the index of a shard, building it if it is missing or stale.

    Args:
        path: The shard.
        index_dir: Folder of its index; None: its own, or that of the cache.
        cache: Where remote shards are staged.
        version: That of the shard, if it is known.
    """
    return read_index(find_index(path, index_dir, cache, version))


def find_index(
    path: str, index_dir: str | None, cache: ShardCache = DEFAULT, version: Version | None = None
) -> Path:
    """Return where the index of a shard lies, building it if it is missing or stale; see ``load_index``."""
    return _found(path, index_dir, cache, version)[0]


def summarize(
    path: str, index_dir: str | None, cache: ShardCache = DEFAULT, version: Version | None = None
) -> Summary:
    """Return the summary of a shard from its index, building that first if it is missing or stale.

    Args:
        path: The shard.
        index_dir: Folder of its index; None: its own, or that of the cache.
        cache: Where remote shards are staged.
        version: That of the shard, if it is known.

    Raises:
        FileNotFoundError: If the shard is missing.
        ValueError: If it is not an intact tar with samples.
        PermissionError: If the index cannot be written.
    """
    return _found(path, index_dir, cache, version)[1]


def _found(
    path: str, index_dir: str | None, cache: ShardCache, version: Version | None
) -> tuple[Path, Summary]:
    """Find or build the index of a shard: in ``index_dir``, or else next to it or in a cache."""
    if not is_remote(path) and not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such shard")
    version = version or cache.version(path)
    own = [cache.index_dir] if is_remote(path) else [None, *_caches()]
    targets = [sidecar(path, folder) for folder in ([index_dir] if index_dir else own)]
    for target in targets:
        if summary := read_summary(path, target, version):
            return target, summary
    if is_remote(path) and (found := fetch_index(path, version, targets, cache)):
        return found
    return _build(path, version, targets, cache)


def _caches() -> list[str]:
    """List folders for indices of shards that are read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = [os.path.join(home, "ldm", "indices")] if os.path.isabs(home) else []
    return [*folders, os.path.join(tempfile.gettempdir(), f"ldm-indices-{os.getuid()}")]


def summarize_all(paths: Sequence[str], index_dir: str | None, cache: ShardCache = DEFAULT) -> list[Summary]:
    """Summarize shards in parallel, with a progress bar after a second; mark those with repeated keys.

    Args:
        paths: The shards.
        index_dir: Folder of their indices; None: that of each, or that of the cache.
        cache: Where remote shards are staged.
    """
    known = cache.versions(paths)
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        jobs = pool.map(lambda path: summarize(path, index_dir, cache, known.get(path)), paths)
        bar = tqdm(jobs, total=len(paths), desc="index shards", unit=" shards", delay=1.0, leave=False)
        summaries = list(bar)
        repeated: set[int] = set()
        for group in overlapping([summary.span for summary in summaries]):
            listed = [(paths[n], index_dir, cache, summaries[n].known_version) for n in group]
            keys = pool.map(lambda about: load_index(*about).keys, listed)
            repeated |= {group[number] for number in repeating(list(keys))}
    return [replace(summary, has_repeated_keys=n in repeated) for n, summary in enumerate(summaries)]


def fingerprint(summaries: Sequence[Summary]) -> str:
    """Hash names, sizes and counts of shards, in their order: what a run's order of samples depends on."""
    lines = [f"{shard_name(s.path)}\t{s.size}\t{s.count}\n" for s in summaries]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _build(path: str, version: Version, targets: Sequence[Path], cache: ShardCache) -> tuple[Path, Summary]:
    """Build an index and write it to the first path that is writable."""
    if is_remote(path):
        warnings.warn(FIRST_TIME, stacklevel=2)
    with cache.staged(path, version) if is_remote(path) else LocalFile(path) as file:
        index = scan(path, file)
        sha256 = file_hash(file) if is_remote(path) else ""
    counts = (index.offsets >= 0).sum(axis=0).tolist()
    keys = [bytes(key).decode() for key in index.keys]
    summary = Summary(
        path,
        version.size,
        version.mtime_ns,
        len(index),
        dict(zip(index.members, counts, strict=True)),
        (min(keys), max(keys)) if keys else ("", ""),
        len(index.lost),
        index.lost[0] if index.lost else "",
        tag=version.tag,
        sha256=sha256,
    )
    return write_index(index, summary, targets), summary


def confirm(summary: Summary, file: FileIO, index_dir: str | None, cache: ShardCache) -> None:
    """Compare an index that was taken from next to a remote shard with the shard, once that is staged.

    Raises:
        ValueError: If it is that of another shard.
    """
    target, stored = _found(summary.path, index_dir, cache, summary.version)
    if stored.sha256:
        return
    index, given = scan(summary.path, file), read_index(target)
    if not all(np.array_equal(vars(index)[name], vars(given)[name]) for name in ("keys", "offsets", "sizes")):
        target.unlink(missing_ok=True)
        raise ValueError(
            f"{beside(identity(summary.path), INDEX)}: the index next to the shard is that of another one: "
            "delete it, or upload that of this shard"
        )
    write_index(index, replace(stored, sha256=file_hash(file)), [target])
