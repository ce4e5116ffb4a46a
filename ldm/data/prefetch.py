"""Shards that are read next are staged in the background."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

THREADS, PAUSE = 2, 1.0
"""Shards that a process stages at once, and seconds until one is tried again for which there was no room."""


class Prefetcher:
    """Stages shards in the order in which they are read, in threads of the process that reads.

    All processes of a node begin with the same shards: each leaves out those that another one is staging.
    The threads end when nobody holds the prefetcher any more, after the shards that they are staging then.

    Args:
        stage: Stages a shard, by its number; whether it is there now.
    """

    def __init__(self, stage: Callable[[int], bool]) -> None:
        self._stage = stage
        self._announced: deque[frozenset[int]] = deque(maxlen=2)  # where two groups meet, both are read
        self._staging: _Staging | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave threads behind when this travels to another process."""
        return {**self.__dict__, "_staging": None}

    def follow(self, shard: int, upcoming: Callable[[], tuple[Sequence[int], Sequence[int]]]) -> None:
        """Stage what is read next, from the first sample of a group of shards on.

        Args:
            shard: The one that is read now.
            upcoming: Gives those that are read together with it, and those after them; asked for the first
                shard of each group.
        """
        if self._staging is None or self._staging.process != os.getpid():  # new, or forked
            self._staging = _Staging(self._stage)
            weakref.finalize(self, self._staging.end).atexit = False
            self._announced.clear()
        if not any(shard in group for group in self._announced):
            now, later = upcoming()
            self._announced.append(frozenset(now))
            self._staging.begin([*now, *later])


class _Staging:
    """Threads that stage the shards of a list until another one replaces it."""

    def __init__(self, stage: Callable[[int], bool]) -> None:
        self.process = os.getpid()
        self._stage = stage
        self._todo: deque[int] = deque()
        self._again: list[int] = []
        self._has_ended = False
        self._changed = threading.Condition()
        for _ in range(THREADS):
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def begin(self, shards: Sequence[int]) -> None:
        with self._changed:
            self._todo, self._again = deque(shards), []
            self._changed.notify_all()

    def end(self) -> None:
        if self.process == os.getpid():  # a forked process has no such threads, but a lock that one may hold
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _run(self) -> None:
        while (found := self._next()) is not None:
            shard, again = found
            if not self._is_staged(shard):
                again.append(shard)

    def _next(self) -> tuple[int, list[int]] | None:
        """Wait for a shard; also return the list that takes it if it must be tried again. None: the end."""
        with self._changed:
            while not (self._todo or self._has_ended):
                self._changed.wait(PAUSE if self._again else None)
                if not self._todo:
                    self._todo.extend(self._again)
                    self._again.clear()
            return None if self._has_ended else (self._todo.popleft(), self._again)

    def _is_staged(self, shard: int) -> bool:
        try:
            return self._stage(shard)
        except Exception:  # who reads the shard meets it again, and says it
            return True
