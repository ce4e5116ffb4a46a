"""Write a shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import webdataset

from ldm.io.atomic import replacing


@contextmanager
def tar_writer(path: Path) -> Iterator[webdataset.TarWriter]:
    """Open a writer of samples, ``{"__key__": str, member: bytes, ...}``, to a shard.

    The shard appears, complete, after the ``with`` block. Equal samples give equal bytes: no time is written.
    """
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0) as writer,
    ):
        yield writer
