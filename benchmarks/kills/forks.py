"""Commands as processes that cost no import: forks of this one, which has imported everything."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Command:
    """A command line.

    Args:
        main: The command.
        arguments: What follows its name.
        folder: Where it runs, and leaves what it prints, in the file ``log``.
    """

    main: Main
    arguments: list[str]
    folder: Path

    def start(self, world: int = 1) -> Processes:
        """Start it, on several processes as torchrun does."""
        shared: dict[str, str] = {}
        if world > 1:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
            shared |= {"LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "kills"}
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), **shared} if shared else {} for r in range(world)]
        return Processes([self._fork(variables) for variables in ranks])

    def finish(self, world: int = 1) -> None:
        """Let it run to its end.

        Raises:
            RuntimeError: If it fails.
        """
        if codes := [code for code in self.start(world).wait(3600) if code]:
            raise RuntimeError(f"exit code {codes[0]}: {(self.folder / 'log').read_text()[-3000:]}")

    def _fork(self, variables: Mapping[str, str]) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.environ.update(variables)
            rank_zero_only.rank = int(variables.get("RANK", "0"))  # type: ignore[attr-defined]
            sys.argv = ["kills", *self.arguments]
            code = self.main(self.arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class Processes:
    """The processes of a command.

    Args:
        pids: Theirs, the first one's first; each leads a session of its own.
    """

    def __init__(self, pids: list[int]) -> None:
        self.pids = pids
        self._codes: dict[int, int] = {}

    @property
    def is_running(self) -> bool:
        """Whether all of them are."""
        self._reap()
        return not self._codes

    def send(self, number: signal.Signals, which: slice) -> None:
        """Send a signal to those that still run, and to the workers of those that are killed."""
        self._reap()
        for pid in self.pids[which]:
            if pid not in self._codes:
                try:
                    (os.killpg if number == signal.SIGKILL else os.kill)(pid, number)
                except ProcessLookupError:  # killed before it led a session
                    os.kill(pid, number)

    def wait(self, seconds: float) -> list[int]:
        """Wait for their end, and return their exit codes; those that do not end are killed."""
        end = time.monotonic() + seconds
        while len(self._codes) < len(self.pids) and time.monotonic() < end:
            self._reap()
            time.sleep(0.02)
        for pid in self.pids:
            if pid not in self._codes:
                os.killpg(pid, signal.SIGKILL)
                self._codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [self._codes[pid] for pid in self.pids]

    def _reap(self) -> None:
        for pid in self.pids:
            if pid not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
