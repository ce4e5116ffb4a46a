"""Locks of folders that one command at a time may write to, on any node that sees them."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from ldm.io.atomic import write_text

LOCK, HOLDER = ".lock", ".lock-holder.txt"
HEARTBEAT, LEASE = 5.0, 60.0
"""Seconds between two signs of life of a holder, and without one until its lock may be taken over."""


@contextmanager
def held(folder: Path, option: str) -> Iterator[None]:
    """Hold the lock of a folder for the length of a ``with`` block; it is made if it is not there.

    A process that was killed leaves its lock behind: on the same node it is taken at once, for the process is
    gone, and on another one after ``LEASE`` seconds without a sign of life. No part of it needs the locks or
    clocks of a file system. A holder that finds its folder taken, because it was frozen, ends.

    Args:
        folder: The folder.
        option: What names it on the command line.

    Raises:
        ValueError: If another process holds it; the message says who, and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(
        folder / LOCK,
        lease_duration=LEASE,
        heartbeat_interval=HEARTBEAT,
        thread_local=False,
        on_compromise=lambda _: _retake(lock, folder),
    )
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if lock.is_lock_held_by_us:  # by another object: built twice, as in a notebook
            yield
            return
        _wait(lock, folder, option)
    holder, job = folder / HOLDER, os.environ.get("SLURM_JOB_ID")
    me = f"process {os.getpid()} on {socket.gethostname()}" + (f" (SLURM job {job})" if job else "")
    write_text(holder, f"{me} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def waiting(path: Path) -> SoftFileLease:
    """Make a lock for a ``with`` block, which waits for processes of any node as long as they live."""
    return SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False)


def _wait(lock: SoftFileLease, folder: Path, option: str) -> None:
    """Take over the lock of a holder that gives no sign of life."""
    try:
        who = (folder / HOLDER).read_text(encoding="utf-8")
    except OSError:
        who = "another process" if lock.owner is None else f"process {lock.pid} on {lock.owner.hostname}"
    where = f"{option}: '{folder}' is in use by {who}"
    try:
        lock.acquire(timeout=2 * LEASE, poll_interval=0.5, cancel_check=_beats(folder / LOCK, where))
    except Timeout as error:
        raise ValueError(
            f"{where}: wait for its end, stop it, or delete {LOCK} there if that process is gone"
        ) from error


def _beats(path: Path, where: str) -> Callable[[], bool]:
    """Return a check whether a lock's holder gives a sign of life from now on; a warning if none comes."""
    first, since = _modified(path), time.monotonic()
    warned = False

    def beats() -> bool:
        nonlocal warned
        if _modified(path) not in (first, None):
            return True
        if not warned and time.monotonic() - since > 2 * HEARTBEAT:
            warned = True
            print(
                f"{where}, without a sign of life: waiting {LEASE:.0f} s for one", file=sys.stderr, flush=True
            )
        return False

    return beats


def _modified(path: Path) -> int | None:
    try:
        with path.open() as file:  # opening it makes NFS fetch the current time of its server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:  # the holder has just gone
        return None


def _retake(lock: SoftFileLease, folder: Path) -> None:
    """Take a lock again that was lost: it was deleted, or its file system did not answer."""
    lock.release()
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if lock.is_lock_held_by_us:  # the folder was deleted, and built again in this process
            return
        print(
            f"error: '{folder}' was taken over by another process: this one ends", file=sys.stderr, flush=True
        )
        os._exit(1)
    except OSError as error:
        print(f"warning: the lock of '{folder}' is lost: {error}", file=sys.stderr, flush=True)
