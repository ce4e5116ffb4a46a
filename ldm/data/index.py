"""Sidecar index of a tar shard: where each member of each sample lies, so that any sample is one seek away.

The index is written beside the shard (``000017.tar`` -> ``000017.tar.index.npz``) or into a folder of its
own, by rename, and is rebuilt when size or modification time of the shard differ from what it was built for.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data.fields import whitelist
from ldm.data.tar import members, split_name
from ldm.io.atomic import replacing

_VERSION = 2  # raise it when the arrays change: older sidecars are then rebuilt


@dataclass(frozen=True)
class Summary:
    """What must be known of a shard before any of its samples is read.

    Args:
        path: The tar file.
        size: Its size in bytes.
        mtime_ns: When it was modified, ns since 1970.
        count: Number of samples.
        present: Member name to the number of samples that have it.
    """

    path: str
    size: int
    mtime_ns: int
    count: int
    present: dict[str, int]


@dataclass(frozen=True)
class Index:
    """All members of a shard.

    Args:
        members: E names, the whitelist.
        keys: (N,) UTF-8 bytes, in the order of the tar.
        offsets: (N, E) int64, first byte of each member; -1 where a sample lacks it.
        sizes: (N, E) int64, bytes.
    """

    members: tuple[str, ...]
    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray

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
    """Build the index of a tar by reading its headers.

    Members of a sample need not be adjacent. Members outside the whitelist are ignored.

    Raises:
        ValueError: If the file is not an intact tar, holds no sample, or holds a member twice.
    """
    names = whitelist()
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    ignored = ""
    for name, offset, size in members(path):
        key, extension = split_name(name)
        if key is None or extension not in names:
            ignored = name
            continue
        row = rows.setdefault(key, {})
        if extension in row:
            raise ValueError(f"{path}: member '{name}' is there twice, expected unique names")
        row[extension] = (offset, size)
    if not rows:
        found = f"only members such as '{ignored}'" if ignored else "no member at all"
        raise ValueError(
            f"{path}: empty shard: found {found}, expected KEY.jpg, KEY.txt ... (data/README.md)"
        )
    table = np.array([[row.get(name, (-1, 0)) for name in names] for row in rows.values()], dtype=np.int64)
    return Index(names, np.array([key.encode() for key in rows]), table[:, :, 0], table[:, :, 1])


def sidecar(path: str, index_dir: str | None) -> Path:
    """Return where the index of a shard lies.

    In a folder of its own the name carries a hash of the shard's path: two folders may share shard names.
    """
    if index_dir is None:
        return Path(f"{path}.index.npz")
    tag = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:8]
    return Path(index_dir) / f"{Path(path).stem}-{tag}.index.npz"


def load_index(path: str, index_dir: str | None) -> Index:
    """Read the index of a shard, building it if it is missing or stale."""
    summarize(path, index_dir)
    with np.load(sidecar(path, index_dir), allow_pickle=False) as arrays:
        members = tuple(arrays["members"].tolist())
        return Index(members, arrays["keys"], arrays["offsets"], arrays["sizes"])


def summarize(path: str, index_dir: str | None) -> Summary:
    """Return the summary of a shard from its index, building that first if it is missing or stale.

    Raises:
        FileNotFoundError: If the shard is missing.
        ValueError: If it is not an intact tar with samples.
        PermissionError: If the index cannot be written.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such shard")
    return _read_summary(path, index_dir) or _build(path, index_dir)


def summarize_all(paths: Sequence[str], index_dir: str | None) -> list[Summary]:
    """Summarize shards in parallel, with a progress bar if it takes over a second."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        jobs = pool.map(lambda path: summarize(path, index_dir), paths)
        return list(tqdm(jobs, total=len(paths), desc="index shards", unit=" shards", delay=1.0, leave=False))


def fingerprint(summaries: Sequence[Summary]) -> str:
    """Hash names, sizes and counts of shards, in their order: what a run's order of samples depends on."""
    lines = [f"{os.path.basename(s.path)}\t{s.size}\t{s.count}\n" for s in summaries]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _read_summary(path: str, index_dir: str | None) -> Summary | None:
    """Return the summary; None if its sidecar is missing, damaged, stale or of another whitelist."""
    stat = os.stat(path)
    try:
        with np.load(sidecar(path, index_dir), allow_pickle=False) as arrays:
            meta, names = arrays["meta"].tolist(), tuple(arrays["members"].tolist())
            present = dict(zip(names, arrays["present"].tolist(), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if meta[:3] != [_VERSION, stat.st_size, stat.st_mtime_ns] or names != whitelist():
        return None
    return Summary(path, meta[1], meta[2], meta[3], present)


def _build(path: str, index_dir: str | None) -> Summary:
    stat = os.stat(path)
    index = scan(path)
    present = (index.offsets >= 0).sum(axis=0)
    meta = np.array([_VERSION, stat.st_size, stat.st_mtime_ns, len(index)], dtype=np.int64)
    _write(sidecar(path, index_dir), meta, present, index)
    counts = dict(zip(index.members, present.tolist(), strict=True))
    return Summary(path, stat.st_size, stat.st_mtime_ns, len(index), counts)


def _write(target: Path, meta: np.ndarray, present: np.ndarray, index: Index) -> None:
    try:
        with replacing(target) as temporary, temporary.open("wb") as file:
            np.savez(file, meta=meta, present=present, **vars(index))
    except OSError as error:
        raise PermissionError(
            f"{target}: the index of the shard cannot be written ({error.strerror}): name a folder that can "
            "be written in data.reader.init_args.index_dir (ldm.encode: --index-dir)"
        ) from error
