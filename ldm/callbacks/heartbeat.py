"""Heartbeats of the processes: find out which one keeps the others waiting."""

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
"""Exit code of a run that was ended because it hung, as of GNU ``timeout``."""

STDERR = sys.__stderr__ or sys.stderr
"""Standard error of the process: its stand-in in a notebook or a test cannot be written to from C."""

NUM_NAMED, NUM_CALLS = 8, 12
"""Processes that a message names, and calls of each."""


class Heartbeat(NamedTuple):
    """Status that a process reports at intervals.

    ``tick`` counts the times, ``signs`` what training has done; ``phase`` is the last of that.
    """

    host: str
    tick: int
    signs: int
    phase: str


class Verdict(NamedTuple):
    """Ranks that all others wait for, none if all hang at the same point, and the reason in words."""

    guilty: list[int]
    reason: str


class HeartbeatStore:
    """Heartbeats of all processes, in the rendezvous store; rank 0 evaluates them.

    Args:
        rank: This process.
        world: How many there are.
        store: Reachable from all of them.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank = rank
        self.world = world
        self._store = store

    def report(self, beat: Heartbeat) -> None:
        """Leave a beat."""
        self._store.set(f"ldm/beat/{self.rank}", json.dumps(beat))

    def everyones(self) -> dict[int, Heartbeat]:
        """Read the last beat of each process that has left one."""
        keys = {rank: f"ldm/beat/{rank}" for rank in range(self.world)}
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Heartbeat(*json.loads(self._store.get(key))) for rank, key in there.items()}

    def publish(self, verdict: Verdict) -> None:
        """Let the others know."""
        self._store.set("ldm/verdict", json.dumps(verdict))

    def verdict(self) -> Verdict | None:
        """Read what the first process has found, if it has."""
        there = self._store.check(["ldm/verdict"])
        return Verdict(*json.loads(self._store.get("ldm/verdict"))) if there else None


class HeartbeatMonitor:
    """Ends this process once training has given no sign for ``timeout`` seconds, and reports who is to blame.

    One thread talks to the other processes. A second one ends the process if the first cannot: because the
    store does not answer. If both cannot, because something keeps the interpreter's lock, faulthandler does.

    Args:
        timeout: Seconds.
        beats: Where it learns how the other processes are.
        end: Ends this process; it gets the exit code.
    """

    def __init__(self, timeout: float, beats: HeartbeatStore, end: Callable[[int], object]) -> None:
        self.timeout = timeout
        self.interval = min(5.0, timeout / 4)
        self._beats, self._exit = beats, end
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._tick = self._signs = 0
        self._phase, self._since = "at the start", time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to watch."""
        for run in (self._talk, self._guard):
            threading.Thread(target=run, name=f"watch{run.__name__}", daemon=True).start()

    def stop(self) -> None:
        """End watching."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def sign(self, phase: str) -> None:
        """Record a sign of training."""
        self._signs, self._phase, self._since = self._signs + 1, phase, time.monotonic()

    @property
    def late(self) -> float:
        """Intervals since training should have given a sign."""
        return (time.monotonic() - self._since - self.timeout) / self.interval

    def _talk(self) -> None:
        try:
            self._report()
            while not self._over.wait(self.interval):
                self._report()
                if self.late > 0 and (verdict := self._judge()) is not None:
                    self._end(verdict)
                    return
        except RuntimeError:  # torch's, whatever the network's error was
            return

    def _guard(self) -> None:
        while not self._over.wait(self.interval):
            faulthandler.dump_traceback_later(self.timeout + 16 * self.interval, exit=True, file=STDERR)
            if self.late > 10:
                gone = Verdict([], "process 0 cannot be heard: killed, stopped, or cut off from this one")
                self._print(gone)
                self._exit(EXIT_CODE)
                return

    def _report(self) -> None:
        self._tick += 1
        self._beats.report(Heartbeat(self._host, self._tick, self._signs, self._phase))

    def _judge(self) -> Verdict | None:
        if self._beats.rank > 0:
            return self._beats.verdict()
        before = self._beats.everyones()
        for _ in range(3):  # those without a new beat by then are gone
            time.sleep(self.interval)
            self._report()
        verdict = blame(before, self._beats.everyones(), self._beats.world)
        self._beats.publish(verdict)
        return verdict

    def _end(self, verdict: Verdict) -> None:
        if self._beats.rank in (0, *verdict.guilty[:NUM_NAMED]):
            self._print(verdict)
        # the first one leaves first, for the job ends as it does, but when the others have reported
        time.sleep((2 if self._beats.rank == 0 else 4) * self.interval)
        self._exit(EXIT_CODE)

    def _print(self, verdict: Verdict) -> None:
        seconds = time.monotonic() - self._since
        me = f"process {self._beats.rank} of {self._beats.world} on {self._host}, {self._phase}"
        stood = f"no progress for {seconds:.0f} s (--watchdog.timeout {self.timeout:g})"
        print(
            f"error: {stood}: {verdict.reason}\n{me}, stands here:\n{main_thread()}",
            file=sys.stderr,
            flush=True,
        )


def blame(before: dict[int, Heartbeat], after: dict[int, Heartbeat], world: int) -> Verdict:
    """Find out who keeps all waiting: silent ones, else those that have done least.

    Args:
        before: Beats of the processes when training was found to stand.
        after: The same, long enough later for each process to have left another.
        world: How many processes there are.
    """
    silent = [r for r in range(world) if r not in after or before.get(r, after[r]).tick == after[r].tick]
    if silent:
        return Verdict(silent, f"{_names(silent, after)} cannot be heard: killed, stopped, or cut off")
    least = min(beat.signs for beat in after.values())
    behind = [rank for rank, beat in after.items() if beat.signs == least]
    if len(behind) == world:
        return Verdict([], f"{'all processes stand' if world > 1 else 'it stands'} {after[0].phase}")
    names, phase = _names(behind, after), after[behind[0]].phase
    return Verdict(behind, f"{names} stands {phase}, and the others wait for it")


def main_thread() -> str:
    """Return the innermost calls of this process's main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame, NUM_CALLS)).rstrip()


def _names(ranks: list[int], beats: dict[int, Heartbeat]) -> str:
    named = [f"process {r} ({beats[r].host})" if r in beats else f"process {r}" for r in ranks[:NUM_NAMED]]
    rest = len(ranks) - NUM_NAMED
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "")
