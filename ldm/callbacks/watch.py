"""Watch that training goes on, and find out which process keeps the others waiting."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from torch.distributed import Store

EXIT_CODE = 124
"""Of a run that was ended because it hung: what ``timeout`` of the GNU tools leaves."""

STDERR = sys.__stderr__ or sys.stderr
"""Of the process: what stands for it in a notebook or a test cannot be written to from C."""

NUM_NAMED, NUM_CALLS = 8, 12
"""Processes that a message names, and calls of each."""


class Beat(NamedTuple):
    """What a process says of itself, again and again.

    ``tick`` counts the times, ``signs`` what training has done; ``phase`` is the last of that.
    """

    host: str
    tick: int
    signs: int
    phase: str


class Beats:
    """Where every process leaves its last beat: the store by which the processes met.

    Args:
        rank: This process.
        world: How many there are.
        store: Reachable from all of them.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank = rank
        self.world = world
        self.store = store

    def tell(self, beat: Beat) -> None:
        """Leave a beat."""
        self.store.set(f"ldm/beat/{self.rank}", json.dumps(beat))

    def everyones(self) -> dict[int, Beat]:
        """Read the last beat of each process that has left one."""
        keys = {rank: f"ldm/beat/{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: Beat(*json.loads(self.store.get(key))) for rank, key in there.items()}


class Alone(Beats):
    """The beats of one process, which needs no store."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._last: dict[int, Beat] = {}

    def tell(self, beat: Beat) -> None:
        """Leave a beat."""
        self._last = {0: beat}

    def everyones(self) -> dict[int, Beat]:
        """Read it again."""
        return self._last


class Watch:
    """A thread that ends this process once training has given no sign for ``timeout`` seconds.

    Args:
        timeout: Seconds.
        beats: Where it learns how the other processes are.
        end: Ends this process; it gets the exit code.
    """

    def __init__(self, timeout: float, beats: Beats, end: Callable[[int], object]) -> None:
        self.timeout = timeout
        self.interval = min(5.0, timeout / 4)
        self._beats, self._exit = beats, end
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._tick = self._signs = 0
        self._phase, self._since = "at the start", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def sign(self, phase: str) -> None:
        """Note that training goes on."""
        self._signs, self._phase, self._since = self._signs + 1, phase, time.monotonic()

    def _run(self) -> None:
        self._tell()
        while not self._stopped.wait(self.interval):
            # runs out if this thread cannot: when the interpreter's lock is held for ever, or the store hangs
            faulthandler.dump_traceback_later(self.timeout + 12 * self.interval, exit=True, file=STDERR)
            self._tell()
            if time.monotonic() - self._since > self.timeout:
                self._end()
                return

    def _tell(self) -> bool:
        """Leave a beat; return whether it could be left."""
        self._tick += 1
        try:
            self._beats.tell(Beat(self._host, self._tick, self._signs, self._phase))
        except RuntimeError:  # torch's, whatever the network said
            return False
        return True

    def _end(self) -> None:
        before = self._read()
        for _ in range(3):  # until all others have noticed too; those that say nothing new are gone
            self._tell()
            time.sleep(self.interval)
        guilty, reason = blame(before, self._read(), self._beats.world)
        seconds = time.monotonic() - self._since
        stood = f"no progress for {seconds:.0f} s (--watchdog.timeout {self.timeout:g})"
        me = f"process {self._beats.rank} of {self._beats.world} on {self._host}, {self._phase}"
        if self._beats.rank in (0, *guilty[:NUM_NAMED]):
            say(f"error: {stood}: {reason}\n{me}, stands here:\n{main_thread()}")
        elif 0 in guilty:  # which may not be able to say so itself
            say(f"error: {stood}: {reason}")
        time.sleep(self.interval)  # the first process holds the store that others still read
        self._exit(EXIT_CODE)

    def _read(self) -> dict[int, Beat]:
        try:
            return self._beats.everyones()
        except RuntimeError:
            return {}


def blame(before: dict[int, Beat], after: dict[int, Beat], world: int) -> tuple[list[int], str]:
    """Find out who keeps all waiting: those that say nothing, else those that have done least.

    Args:
        before: Beats of the processes when training was found to stand.
        after: The same, long enough later for each process to have left another.
        world: How many processes there are.

    Returns:
        Their ranks, none if all stand at the same point, and the reason in words.
    """
    if not after:
        return [0], "process 0 cannot be reached: it, its node or the network to it is gone"
    silent = [r for r in range(world) if r not in after or before.get(r, after[r]).tick == after[r].tick]
    if silent:
        return silent, f"{_names(silent, after)} cannot be heard: killed, stopped, or cut off"
    least = min(beat.signs for beat in after.values())
    behind = [rank for rank, beat in after.items() if beat.signs == least]
    if len(behind) == world:
        return [], f"{'all processes stand' if world > 1 else 'it stands'} {after[0].phase}"
    return behind, f"{_names(behind, after)} stands {after[behind[0]].phase}, and the others wait for it"


def main_thread() -> str:
    """Say where the main thread of this process is: its innermost calls."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame, NUM_CALLS)).rstrip()


def say(text: str) -> None:
    """Write to the standard error of the process, at once."""
    print(text, file=sys.stderr, flush=True)


def _names(ranks: list[int], beats: dict[int, Beat]) -> str:
    named = [f"process {r} ({beats[r].host})" if r in beats else f"process {r}" for r in ranks[:NUM_NAMED]]
    rest = len(ranks) - NUM_NAMED
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
