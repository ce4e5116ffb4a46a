"""Sidecar index of a tar shard: byte offsets of all members, so that any sample is one seek away.

The index is written next to the shard (``000017.tar`` -> ``000017.tar.index.npz``), by rename, or into a
cache of the user if that is read-only, or into a folder of its own. It is rebuilt when size or modification
time of the shard differ from those that it was built for.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.data.fields import whitelist
from ldm.data.keys import join_twins, overlapping, repeating
from ldm.data.tar import INDEX, members, split_name
from ldm.io.atomic import replacing

_VERSION = 4  # raise it when the arrays change: older sidecars are then rebuilt


@dataclass(frozen=True)
class Summary:
    """Summary of a shard, which is known before any of its samples is read.

    Args:
        path: The tar file.
        size: Its size in bytes.
        mtime_ns: When it was modified, ns since 1970.
        count: Number of samples.
        present: Member name to the number of samples that have it.
        span: Least and greatest key.
        lost: Members that belong to no sample although their names end like those of one.
        lost_example: One of them, and why.
        has_repeated_keys: Whether an earlier shard has one of its keys.
    """

    path: str
    size: int
    mtime_ns: int
    count: int
    present: dict[str, int]
    span: tuple[str, str] = ("", "")
    lost: int = 0
    lost_example: str = ""
    has_repeated_keys: bool = False

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Summary:
        """Restore what ``vars`` gave."""
        return cls(**{**found, "span": tuple(found["span"])})


@dataclass(frozen=True)
class Index:
    """All members of a shard.

    Args:
        members: E names, the whitelist.
        keys: (N,) UTF-8 bytes, in the order of the tar.
        offsets: (N, E) int64, first byte of each member; -1 where a sample lacks it.
        sizes: (N, E) int64, bytes.
        lost: Members that belong to no sample although their names end like those of one, and why: found by
            ``scan``, not kept.
    """

    members: tuple[str, ...]
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Return the name of a sample."""
        return bytes(self.keys[row]).decode("utf-8")

    def spans(self, row: int, members: Iterable[str]) -> list[tuple[str, int, int]]:
        """Return (member name, offset, size) of those of ``members`` that a sample has."""
        columns = [(name, self.members.index(name)) for name in members]
        return [
            (name, int(self.offsets[row, c]), int(self.sizes[row, c]))
            for name, c in columns
            if self.offsets[row, c] >= 0
        ]


def scan(path: str) -> Index:
    """Build the index of a tar by reading its headers; it is empty if the tar is.

    Members of a sample need not be adjacent. Members outside the whitelist are ignored.

    Raises:
        ValueError: If the file is not an intact tar, has members but no sample, or has a member twice.
    """
    names = whitelist()
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    foreign: dict[str, str | None] = {}
    dangling: list[str] = []
    for name, offset, size in members(path, dangling):
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


def sidecar(path: str, index_dir: str | None) -> Path:
    """Return the path of a shard's index.

    In a folder of its own the name carries a hash of the shard's path: names of shards may repeat.
    """
    if index_dir is None:
        return Path(path + INDEX)
    tag = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:8]
    return Path(index_dir) / f"{Path(path).stem}-{tag}{INDEX}"


def find_index(path: str, index_dir: str | None) -> Path:
    """Return where the index of a shard lies, building it if it is missing or stale."""
    return _found(path, index_dir)[0]


def load_index(path: str, index_dir: str | None) -> Index:
    """Read the index of a shard, building it if it is missing or stale."""
    with np.load(find_index(path, index_dir), allow_pickle=False) as arrays:
        members = tuple(arrays["members"].tolist())
        return Index(members, arrays["keys"], arrays["offsets"], arrays["sizes"])


def summarize(path: str, index_dir: str | None) -> Summary:
    """Return the summary of a shard from its index, building that first if it is missing or stale.

    Raises:
        FileNotFoundError: If the shard is missing.
        ValueError: If it is not an intact tar with samples.
        PermissionError: If the index cannot be written.
    """
    return _found(path, index_dir)[1]


def _found(path: str, index_dir: str | None) -> tuple[Path, Summary]:
    """Find or build the index of a shard: in ``index_dir``, or else next to it or in a cache."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such shard")
    targets = [sidecar(path, folder) for folder in ([index_dir] if index_dir else [None, *_caches()])]
    for target in targets:
        if summary := _read_summary(path, target):
            return target, summary
    return _build(path, targets)


def _caches() -> list[str]:
    """List folders for indices of shards that are read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folders = [os.path.join(home, "ldm", "indices")] if os.path.isabs(home) else []
    return [*folders, os.path.join(tempfile.gettempdir(), f"ldm-indices-{os.getuid()}")]


def summarize_all(paths: Sequence[str], index_dir: str | None) -> list[Summary]:
    """Summarize shards in parallel, with a progress bar after a second; mark those with repeated keys."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        jobs = pool.map(lambda path: summarize(path, index_dir), paths)
        bar = tqdm(jobs, total=len(paths), desc="index shards", unit=" shards", delay=1.0, leave=False)
        summaries = list(bar)
        repeated: set[int] = set()
        for group in overlapping([summary.span for summary in summaries]):
            keys = pool.map(lambda number: load_index(paths[number], index_dir).keys, group)
            repeated |= {group[number] for number in repeating(list(keys))}
    return [replace(summary, has_repeated_keys=n in repeated) for n, summary in enumerate(summaries)]


def fingerprint(summaries: Sequence[Summary]) -> str:
    """Hash names, sizes and counts of shards, in their order: what a run's order of samples depends on."""
    lines = [f"{os.path.basename(s.path)}\t{s.size}\t{s.count}\n" for s in summaries]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_summary(path: str, target: Path) -> Summary | None:
    """Return the summary; None if its sidecar is missing, damaged, stale or of another whitelist."""
    stat = os.stat(path)
    try:
        with np.load(target, allow_pickle=False) as arrays:
            version, found = json.loads(str(arrays["summary"]))
        summary = Summary.from_json({**found, "path": path})
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    is_same = (version, summary.size, summary.mtime_ns) == (_VERSION, stat.st_size, stat.st_mtime_ns)
    return summary if is_same and tuple(summary.present) == whitelist() else None


def _build(path: str, targets: Sequence[Path]) -> tuple[Path, Summary]:
    """Build an index and write it to the first path that is writable."""
    stat = os.stat(path)
    index = scan(path)
    counts = (index.offsets >= 0).sum(axis=0).tolist()
    keys = [bytes(key).decode() for key in index.keys]
    summary = Summary(
        path,
        stat.st_size,
        stat.st_mtime_ns,
        len(index),
        dict(zip(index.members, counts, strict=True)),
        (min(keys), max(keys)) if keys else ("", ""),
        len(index.lost),
        index.lost[0] if index.lost else "",
    )
    about = np.array(json.dumps([_VERSION, vars(summary)]))
    arrays = {name: value for name, value in vars(index).items() if name != "lost"}
    reason = ""
    for target in targets:
        try:
            with replacing(target) as temporary, temporary.open("wb") as file:
                np.savez(file, summary=about, **arrays)
        except OSError as error:
            reason = reason or f"{target}: the index of the shard cannot be written ({error.strerror})"
        else:
            return target, summary
    raise PermissionError(
        f"{reason}: name a folder that can be written in data.reader.init_args.index_dir (ldm.encode: "
        "--index-dir)"
    )
