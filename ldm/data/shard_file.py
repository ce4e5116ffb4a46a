"""Open shards: a local file, a staged one, or a remote one that is read by range."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from io import FileIO
from pathlib import Path
from typing import Protocol, cast

from ldm.data import remote

_peeks: ContextVar[bool] = ContextVar("_peeks", default=False)


@contextmanager
def peeking() -> Iterator[None]:
    """Read single members of remote shards by range, without staging these, in a ``with`` block."""
    token = _peeks.set(True)
    try:
        yield
    finally:
        _peeks.reset(token)


def is_peeking() -> bool:
    """Whether ``peeking`` is in force."""
    return _peeks.get()


class ShardFile(Protocol):
    """An open shard."""

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    def pread(self, size: int, offset: int) -> bytes:
        """Read ``size`` bytes from ``offset`` on; fewer at the end."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class LocalFile(FileIO):
    """An open file."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self.fileno()).st_size

    def pread(self, size: int, offset: int) -> bytes:
        """Read ``size`` bytes from ``offset`` on; fewer at the end."""
        return os.pread(self.fileno(), size, offset)


class StagedFile(LocalFile):
    """An open file of the cache. Closing it ends its lock, even if a process forked meanwhile has it too."""

    _process = 0

    def __init__(self, path: Path, mode: str = "r") -> None:
        super().__init__(path, mode)
        self._process = os.getpid()

    def close(self) -> None:
        """Unlock and close it; in a forked process only close it."""
        if not self.closed and self._process == os.getpid():
            with suppress(OSError):
                fcntl.flock(self, fcntl.LOCK_UN)
        super().close()


class Ranges:
    """A remote shard that is read by range; by a server that gives none, it is staged.

    Args:
        url: The shard.
        size: Its bytes.
        waits: Seconds before each further try.
        stage: Stages it, if its argument is true, and opens it if it is staged.
    """

    def __init__(
        self, url: str, size: int, waits: Sequence[float], stage: Callable[[bool], ShardFile | None]
    ) -> None:
        self.url, self._size, self.waits, self.stage = url, size, waits, stage

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._size

    def pread(self, size: int, offset: int) -> bytes:
        """Read ``size`` bytes from ``offset`` on."""
        file = self.stage(False)
        if file is None:
            found = remote.read(self.url, offset, size, self.waits)
            if found is not None:
                return found
            file = self.stage(True)
        with closing(cast(ShardFile, file)):
            return cast(ShardFile, file).pread(size, offset)

    def close(self) -> None:
        """Do nothing."""


def lock(file: StagedFile, kind: int) -> None:
    """Wait for a lock of a file and take it, see ``fcntl.flock``.

    Raises:
        OSError: If the file system has no locks.
    """
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"{os.path.dirname(str(file.name))}: no locks on this file system ({error.strerror}): name a "
            "folder on a disk of this node in data.reader.init_args.cache_dir"
        ) from error


def try_lock(file: StagedFile) -> bool:
    """Take a file for oneself, if nobody uses it; whether it was so."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_hash(file: FileIO, name: str = "sha256") -> str:
    """Hash an open file."""
    file.seek(0)
    return hashlib.file_digest(file, name).hexdigest()
