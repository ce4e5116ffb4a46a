"""Bounded folder of staged shards, which all processes of a node share.

Whoever uses a file of it holds a lock (flock) on it: exclusive to write, shared to read; the kernel releases
the locks of a process that was killed. A file that nobody uses is deleted when room is needed, the least
recently used first. If all are in use, the oldest loses its name: its readers keep it open to the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ldm.data import remote
from ldm.data.patience import WAITS
from ldm.data.remote import Version, identity, is_remote, shard_name
from ldm.data.shard_file import LocalFile, Ranges, StagedFile, file_hash, is_peeking, lock, try_lock

PART = ".part-"
"""In the names of shards that are being staged, before their size."""
_OURS = re.compile(rf"-[0-9a-f]{{16}}\.tar({re.escape(PART)}\d+)?$")
GRACE, PAUSE = 2.0, 0.05
"""Seconds until a shard in use loses its name for room, and between two looks."""


def default_folder() -> str:
    """Return the folder for staged shards: LDM_CACHE, or a part of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home if os.path.isabs(home) else tempfile.gettempdir(), "ldm", "shards")
    return os.environ.get("LDM_CACHE") or folder


class _Entry(NamedTuple):
    path: Path
    size: int
    used_ns: int


@dataclass(frozen=True)
class ShardCache:
    """Stages remote shards, whole, in a folder of bounded size.

    Args:
        folder: The folder, on a disk of this node; None takes ``LDM_CACHE`` or ``~/.cache/ldm/shards``.
        max_gb: Bound of its size in 10^9 bytes, not counting the indices in it; None takes ``LDM_CACHE_GB``
            or 50.
        waits: Seconds before each further try to read what does not answer.
    """

    folder: str | None = None
    max_gb: float | None = None
    waits: tuple[float, ...] = WAITS

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(os.path.expanduser(self.folder or default_folder()))

    @property
    def index_dir(self) -> str:
        """Folder for the indices of remote shards; they are never deleted."""
        return str(self.path / "indices")

    @property
    def max_bytes(self) -> int:
        """Bound of the size of all staged shards and their parts."""
        return int(
            1e9 * (float(os.environ.get("LDM_CACHE_GB", "50")) if self.max_gb is None else self.max_gb)
        )

    def version(self, path: str) -> Version:
        """Return the version of a shard, local or remote."""
        if is_remote(path):
            return remote.version(path, self.waits)
        stat = os.stat(path)
        return Version(stat.st_size, stat.st_mtime_ns)

    def versions(self, paths: Sequence[str]) -> dict[str, Version]:
        """Return the versions of those remote shards that stores list."""
        return remote.versions([path for path in paths if is_remote(path)], self.waits)

    def open(
        self, path: str, version: Version, sha256: str = "", release: Callable[[], None] = lambda: None
    ) -> LocalFile | Ranges:
        """Open a shard; a remote one is staged first, but for ``peeking``, and stays while it is open.

        Args:
            path: The shard.
            version: The expected version of a remote shard.
            sha256: Its hash, if that is known.
            release: Called when it must be waited for: who waits should hold no other shard.

        Raises:
            ValueError: If it is larger than the cache, or another one than expected.
            Unreachable: If it cannot be read.
        """
        if not is_remote(path):
            return LocalFile(path)
        if is_peeking():
            target = self._target(path, version)
            take = lambda stages: (  # noqa: E731
                self.staged(path, version, sha256) if stages else _take(target, version.size)
            )
            return Ranges(path, version.size, self.waits, take)
        return self.staged(path, version, sha256, release)

    def staged(
        self, url: str, version: Version, sha256: str = "", release: Callable[[], None] = lambda: None
    ) -> StagedFile:
        """Stage a remote shard and open it, see ``open``."""
        started = time.monotonic()
        while True:
            file = self.stage(url, version, sha256, True, time.monotonic() - started > GRACE)
            if file is not None:
                return file
            release()
            time.sleep(PAUSE)

    def stage(
        self, url: str, version: Version, sha256: str = "", waits: bool = False, forces: bool = False
    ) -> StagedFile | None:
        """Stage a remote shard, unless another process does, or there is no room; open it.

        Args:
            url: The shard.
            version: Its version.
            sha256: Its hash, if that is known.
            waits: Wait while another process stages it.
            forces: Let shards in use lose their names, if there is no room otherwise.
        """
        if version.size > self.max_bytes:
            raise ValueError(
                f"{identity(url)}: the shard has {version.size / 1e9:.3g} GB, expected at most "
                f"{self.max_bytes / 1e9:.3g} (data.reader.init_args.cache_gb)"
            )
        target = self._target(url, version)
        if (file := _take(target, version.size)) is not None:
            return file
        part = self._claim(target, version.size, waits, forces)
        if part is None:
            return None
        try:
            self._fill(url, part, version, sha256)
            with self._locked():
                os.rename(f"{target}{PART}{version.size}", target)
            lock(part, fcntl.LOCK_SH)
        except BaseException:
            part.close()
            raise
        return part

    def fetch(self, url: str) -> bytes | None:
        """Read a small remote file; None if it is not there."""
        return remote.fetch(url, self.waits)

    def _target(self, url: str, version: Version) -> Path:
        about = f"{identity(url)}\n{version.size}\n{version.tag}"
        tag = hashlib.sha256(about.encode()).hexdigest()[:16]
        return self.path / f"{Path(shard_name(url)).stem[:100]}-{tag}.tar"

    def _claim(self, target: Path, size: int, waits: bool, forces: bool) -> StagedFile | None:
        """Take what there is of a shard to write to it, or make room and begin."""
        path = Path(f"{target}{PART}{size}")
        with self._locked():
            if target.exists() or not (path.exists() or self._has_room(size, forces)):
                return None
            path.touch()
            part = StagedFile(path, "r+")
            if try_lock(part):
                return part
        with part:
            if waits:
                lock(part, fcntl.LOCK_SH)  # until the other one is done or gone
        return None

    def _has_room(self, size: int, forces: bool) -> bool:
        """Make room for a shard; whether it was possible."""
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        over = sum(entry.size for entry in entries) + size - self.max_bytes
        for is_forced in (False, True) if forces else (False,):
            for entry in [*entries]:
                if over > 0 and _delete(entry.path, is_forced):
                    over -= entry.size
                    entries.remove(entry)
        return over <= 0

    def _entries(self) -> Iterator[_Entry]:
        for path in self.path.glob("*.tar*"):
            size = path.name.partition(PART)[2]
            if not _OURS.search(path.name):
                continue  # of somebody who named a folder with shards of his own
            with suppress(FileNotFoundError):
                stat = path.stat()
                yield _Entry(path, int(size or stat.st_size), stat.st_mtime_ns)

    def _fill(self, url: str, part: StagedFile, version: Version, sha256: str) -> None:
        """Download the rest of a shard and check it; with another content it comes once more, as a whole."""
        for _ in range(2):
            self._download(url, part, version)
            found = _differs(part, version, sha256)
            if not found:
                break
            os.ftruncate(part.fileno(), 0)
        is_hashed = version.tag.startswith(("sha256:", "md5:"))
        if not (found or is_hashed) and (now := remote.version(url, self.waits)) != version:
            found = f"version {now.tag or now.size}, expected {version.tag or version.size}"
            os.ftruncate(part.fileno(), 0)
        if found:
            raise ValueError(f"{identity(url)}: the shard changed since it was indexed: {found}")

    def _download(self, url: str, part: StagedFile, version: Version) -> None:
        try:
            remote.download(url, part, version.size, self.waits)
        except OSError as error:
            if error.errno in remote.OF_DISK:
                raise OSError(
                    f"{self.path}: no room for shards ({error.strerror}): lower "
                    "data.reader.init_args.cache_gb, or name another cache_dir"
                ) from error
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder: who holds it may add, rename and delete files."""
        self.path.mkdir(parents=True, exist_ok=True)
        with StagedFile(self.path / ".lock", "w") as file:
            lock(file, fcntl.LOCK_EX)
            yield


def _differs(part: StagedFile, version: Version, sha256: str) -> str:
    """Compare a staged shard with the hashes that are known; "" if it has them."""
    kind, _, stored = version.tag.partition(":")
    expected = {"sha256": sha256, "md5": ""} | ({kind: stored} if kind in ("sha256", "md5") else {})
    for name, known in expected.items():
        if known and (found := file_hash(part, name)) != known:
            return f"{name} {found[:12]}..., expected {known[:12]}..."
    return ""


def _take(path: Path, size: int) -> StagedFile | None:
    """Open a staged shard, as one in use; None if there is none."""
    try:
        file = StagedFile(path)
    except FileNotFoundError:
        return None
    lock(file, fcntl.LOCK_SH)
    stat = os.fstat(file.fileno())
    if stat.st_nlink and stat.st_size == size:
        os.utime(file.fileno())
        return file
    file.close()
    if stat.st_nlink:  # damaged
        path.unlink(missing_ok=True)
    return None


def _delete(path: Path, is_forced: bool) -> bool:
    """Delete a file that nobody uses; ``is_forced`` also one that is read."""
    try:
        with StagedFile(path) as file:
            is_free = try_lock(file)
            if is_free or (is_forced and PART not in path.name):
                path.unlink()
                if not is_free:
                    _warn_of_size()
                return True
    except FileNotFoundError:
        return True  # in this or the other turn
    return False


def _warn_of_size() -> None:
    warnings.warn(
        "data.reader.init_args.cache_gb: the shards that are read at the same time do not fit: they take "
        "more of the disk than that, and come several times: raise it, or lower group_shards",
        stacklevel=2,
    )


DEFAULT = ShardCache()
"""The cache of commands that do not configure one."""
