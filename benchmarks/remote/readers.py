"""Processes that read remote shards and may be killed, and what the cache takes of the disk meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from ldm.data.module import Indexed
from ldm.data.source import DataRank, SampleSpec

FORK = multiprocessing.get_context("fork")
BATCH, RANKS, WORKERS = 16, 2, 1


def reader(cache: Path, cache_gb: float) -> Indexed:
    """Make a reader with a cache of its own."""
    return Indexed(2, cache_dir=str(cache), cache_gb=cache_gb)


@dataclass
class Rank:
    """One of the processes of a run, which can be killed and goes on after the last batch that it wrote down.

    Args:
        pattern: URLs of the shards.
        cache: The cache, of all ranks.
        cache_gb: Its bound.
        rank: Number of this one.
        log: File that takes a line of keys per batch.
        num_batches: When it is done.
    """

    pattern: str
    cache: Path
    cache_gb: float
    rank: int
    log: Path
    num_batches: int
    process: BaseProcess | None = field(default=None, init=False)

    @property
    def batches(self) -> list[list[str]]:
        """Keys of the batches that were written down whole."""
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def start(self) -> None:
        """Start the process, or start it again."""
        lines = [" ".join(batch) + "\n" for batch in self.batches]
        self.log.write_text("".join(lines))  # without half a line
        self.process = FORK.Process(target=self._read, args=(len(lines),))
        self.process.start()

    def _read(self, done: int) -> None:
        source = reader(self.cache, self.cache_gb).open(self.pattern, SampleSpec(("text",), 8, 0))
        loader = source.loader(lambda: done * BATCH * RANKS, BATCH, WORKERS, DataRank(self.rank, RANKS))
        with self.log.open("a") as log:
            for batch, _ in zip(loader, range(done, self.num_batches), strict=False):
                log.write(" ".join(batch["key"]) + "\n")
                log.flush()


class Watch:
    """Measures, again and again, what a cache takes of the disk.

    Args:
        folder: The cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak, self.peak_on_disk = folder, 0, 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(0.005):
            named = dict(_sizes(self.folder.glob("*.tar*")))
            self.peak = max(self.peak, sum(named.values()))
            opened = dict(_sizes(_deleted(os.getpid(), str(self.folder))))
            self.peak_on_disk = max(self.peak_on_disk, sum({**opened, **named}.values()))


def _sizes(paths: Iterator[Path]) -> Iterator[tuple[int, int]]:
    """Yield inode and bytes of each file that is still there."""
    for path in paths:
        with suppress(OSError):
            stat = path.stat()
            yield stat.st_ino, stat.st_size


def _deleted(process: int, folder: str) -> Iterator[Path]:
    """Yield the deleted files of a folder that a process, or one that it started, still has open."""
    with suppress(OSError):
        for path in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                name = os.readlink(path)
                if name.startswith(folder) and name.endswith("(deleted)"):
                    yield path
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _deleted(int(child), folder)
