"""Atomic writes: a file is complete or not there, whatever ends the process that writes it."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".tmp-"
"""In the names of unfinished files; without a living process they are leftovers of a killed one."""


def unfinished(path: Path) -> Path:
    """Return a temporary name for ``path`` that is unique to this process, on any node."""
    return path.with_name(f"{path.name}{MARK}{os.uname().nodename}-{os.getpid()}")


def sweep(folder: Path, name: str = "") -> None:
    """Delete from a folder what processes of this node that are gone left half-written.

    Args:
        folder: The folder; it need not exist.
        name: Of the file or folder that was being written; any for "".
    """
    node = os.uname().nodename
    for path in folder.glob(f"{glob.escape(name)}*{MARK}{glob.escape(node)}-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _is_alive(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; the file replaces ``path`` after the ``with`` block.

    After an error ``path`` is unchanged.

    Args:
        path: The file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, atomically; copies where the file system has no hard links."""
    with replacing(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: a power failure may undo a rename otherwise."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
