"""Questions to W&B's server apart from a run: answered within a time limit, no process left behind.

Checked on wandb 0.31.0. The client's process of its own, wandb-core, asks, and waits far longer by itself.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

TIMEOUT = 20.0
"""Seconds until a server without an answer counts as not reachable."""


NEVER = 3600
"""Seconds after which the client would give up: later than ``ask`` does."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of writing to a disk."""


class Unreachable(ValueError):
    """The server gives no answer; it may later, so the exit code is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


def ask(question: Callable[[Any], T], signs: Callable[[], object] = lambda: None) -> T:
    """Ask the server, and end the client's process.

    Args:
        question: Is given a ``wandb.Api``, and returns the answer.
        signs: Its value changes while an answer goes on to arrive, such as the bytes of a download.

    Raises:
        Unreachable: If there is no answer, or no further sign of one, for ``TIMEOUT`` seconds.
        OSError: If what arrives cannot be written.
        ValueError: If wandb is not installed, if there is no key, or if the server refuses; with its reason.
    """
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ValueError(f"it needs Weights & Biases: pip install wandb ({error})") from error

    def answer() -> None:
        try:
            answers.append(question(wandb.Api(timeout=NEVER)))
        except Exception as error:
            errors.append(error)

    answers: list[T] = []
    errors: list[Exception] = []
    with _folders_of_its_own():
        address = wandb.setup().settings.base_url
        asking = Thread(target=answer, name="wandb-ask", daemon=True)
        asking.start()
        _wait(asking, signs)
        is_late = asking.is_alive()
        if wandb.run is None and (is_late or errors):
            kill()
        elif wandb.run is None:
            wandb.teardown()
    if is_late:
        raise Unreachable(f"no answer from {address} within {TIMEOUT:g} s")
    if answers:
        return answers[0]
    if isinstance(errors[0], OSError) and errors[0].errno in DISK:
        raise errors[0]
    if is_no_answer(errors[0]):
        raise Unreachable(f"no answer from {address} ({reason(errors[0])})") from errors[0]
    raise ValueError(reason(errors[0])) from errors[0]


def kill() -> None:
    """Kill the client's process, and let neither the end of ours nor a further run know of it."""
    import wandb
    from wandb.sdk import wandb_setup

    connection = getattr(wandb_setup.singleton(), "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()
        process.wait()
    with suppress(Exception):  # cannot take leave of it
        wandb.teardown()


def is_no_answer(error: Exception) -> bool:
    """Whether the client gave up waiting; what a server refuses it says at once."""
    late = r"deadline exceeded|timed? ?out|connection refused|max retries|failed to connect|unreachable"
    return isinstance(error, TimeoutError) or re.search(late, str(error), re.IGNORECASE) is not None


def reason(error: Exception) -> str:
    """Shorten what the client says: the last line has the server's answer."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^(Failed|Error)[^:]*: |^while retrying: |: \{.*", "", lines[-1])[:100]


def _wait(asking: Thread, signs: Callable[[], object]) -> None:
    sign, limit = signs(), time.monotonic() + TIMEOUT
    while asking.is_alive() and time.monotonic() < limit:
        asking.join(0.05)
        if (now := signs()) != sign:
            sign, limit = now, time.monotonic() + TIMEOUT


@contextmanager
def _folders_of_its_own() -> Iterator[None]:
    """Have the client print nothing, and write to a folder that is deleted, not to the home folder."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True) as folder:
        names = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR", "WANDB_DIR")
        os.environ.update({name: str(Path(folder)) for name in names}, WANDB_SILENT="true")
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)
