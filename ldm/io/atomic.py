"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = ".tmp-"
"""In the name of what is not finished; what has it and no process is left of one that was killed."""


def unfinished(path: Path) -> Path:
    """Return the name under which this process writes what becomes ``path``; no other on any node has it."""
    return path.with_name(f"{path.name}{MARK}{os.uname().nodename}-{os.getpid()}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; what was written there takes the place of ``path`` after the ``with`` block.

    After an error ``path`` is as it was.

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


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names: a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
