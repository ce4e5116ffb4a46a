"""Files of indices: what they hold, where they lie, how they are read and written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.data.cache import ShardCache
from ldm.data.fields import whitelist
from ldm.data.remote import Version, beside, identity, is_remote, shard_name
from ldm.data.tar import INDEX
from ldm.io.arrays import parsed
from ldm.io.atomic import replacing

_VERSION = 4  # raise it when the arrays change: older sidecars are then rebuilt


@dataclass(frozen=True)
class Summary:
    """Summary of a shard, which is known before any of its samples is read.

    Args:
        path: The tar file.
        size: Its size in bytes.
        mtime_ns: When it was modified, ns since 1970; of a remote one a hash of ``tag``.
        count: Number of samples.
        present: Member name to the number of samples that have it.
        span: Least and greatest key.
        lost: Members that belong to no sample although their names end like those of one.
        lost_example: One of them, and why.
        has_repeated_keys: Whether an earlier shard has one of its keys.
        tag: What its store gives to tell versions apart, see ``Version``; "" for a local one.
        sha256: Hash of a remote shard; "" until it was staged.
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
    tag: str = ""
    sha256: str = ""

    @property
    def version(self) -> Version:
        """What the shard was when it was summarized."""
        return Version(self.size, self.mtime_ns, self.tag)

    @property
    def known_version(self) -> Version | None:
        """That of a remote shard, which is not asked for again; None for a local one, which is looked at."""
        return self.version if is_remote(self.path) else None

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

    def fits(self, size: int) -> bool:
        """Whether all members lie within a shard of ``size`` bytes."""
        ends = self.offsets + self.sizes
        return bool((self.sizes >= 0).all() and (ends <= size).all() and (ends >= self.offsets).all())

    def key(self, row: int) -> str:
        """Return the name of a sample."""
        return bytes(self.keys[row]).decode("utf-8")

    def spans(self, row: int, members: Iterable[str]) -> list[tuple[str, int, int]]:
        """Return (member name, offset, size) of those of ``members`` that a sample has."""
        offsets, sizes = self.offsets[row].tolist(), self.sizes[row].tolist()
        columns = _columns(self.members, tuple(members))
        return [(name, offsets[c], sizes[c]) for name, c in columns if offsets[c] >= 0]


@lru_cache(256)
def _columns(members: tuple[str, ...], names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Find the columns of an index in which the members ``names`` stand; once, not for each sample."""
    return [(name, members.index(name)) for name in names]


def sidecar(path: str, index_dir: str | None) -> Path:
    """Return the path of a shard's index.

    In a folder of its own the name carries a hash of the shard's path: names of shards may repeat.
    """
    if index_dir is None:
        return Path(path + INDEX)
    tag = hashlib.sha256(full_name(path).encode()).hexdigest()[:8]
    return Path(index_dir) / f"{Path(shard_name(path)).stem}-{tag}{INDEX}"


def full_name(path: str) -> str:
    """Return what names a shard from everywhere: its absolute path, or its URL without a signature."""
    return identity(path) if is_remote(path) else os.path.abspath(path)


def read_summary(path: str, target: Path | BinaryIO, version: Version | None) -> Summary | None:
    """Return the summary; None if its sidecar is missing, damaged, stale or of another whitelist.

    Args:
        path: The shard.
        target: The sidecar.
        version: That of the shard; None accepts any.
    """
    try:
        with np.load(target, allow_pickle=False) as arrays:
            number, found = json.loads(str(parsed(arrays.__getitem__, "summary")))
        summary = Summary.from_json({**found, "path": path})
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    is_same = number == _VERSION and version in (None, summary.version)
    return summary if is_same and tuple(summary.present) == whitelist() else None


def read_index(file: Path | BinaryIO) -> Index:
    """Read an index."""
    with np.load(file, allow_pickle=False) as arrays:
        names = ("members", "keys", "offsets", "sizes")
        members, keys, offsets, sizes = (parsed(arrays.__getitem__, name) for name in names)
        return Index(tuple(members.tolist()), keys, offsets, sizes)


def fetch_index(
    path: str, version: Version, targets: Sequence[Path], cache: ShardCache
) -> tuple[Path, Summary] | None:
    """Copy the index that lies next to a remote shard; None if there is none, or that of another shard."""
    content = cache.fetch(beside(path, INDEX))
    if content is None:
        return None
    for made_from in (version, None):  # uploaded from here, or from beside a local copy of the shard
        summary = read_summary(path, io.BytesIO(content), made_from)
        if summary is not None and summary.size == version.size and (made_from or not summary.tag):
            index = read_index(io.BytesIO(content))
            if index.fits(version.size):
                summary = replace(summary, mtime_ns=version.mtime_ns, tag=version.tag)
                return write_index(index, summary, targets), summary
    return None


def write_index(index: Index, summary: Summary, targets: Sequence[Path]) -> Path:
    """Write an index to the first path that is writable.

    Raises:
        PermissionError: If none is.
    """
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
            return target
    raise PermissionError(
        f"{reason}: name a folder that can be written in data.reader.init_args.index_dir (ldm.encode: "
        "--index-dir)"
    )
