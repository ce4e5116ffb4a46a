"""W&B's client: begun within a time limit or offline, ended within a time limit, and never left behind.

Checked on wandb 0.31.0. Its process of its own, wandb-core, sends what is logged, so a server that is slow or
gone costs training no time; but it begins and ends a run only with an answer.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from ldm.io import wandb_client
from ldm.io.wandb_client import DISK, Unreachable, is_no_answer, kill, reason

AT_SIGNAL = 10.0
"""Seconds that the end of a run waits at most once SIGTERM or SIGUSR1 came: a job is killed soon after."""


def begin(settings: Mapping[str, Any]) -> Any:
    """Begin a run of W&B.

    Args:
        settings: What ``wandb.init`` takes.

    Raises:
        Unreachable: If there is no answer in time.
        OSError: If it cannot write to its folders.
        ValueError: If W&B refuses, e.g. a key or a project's name.
    """
    import wandb
    from wandb.sdk.lib import import_hooks

    logging.raiseExceptions = False  # a traceback for each line of its log on a full disk
    address = wandb.setup().settings.base_url
    limits = wandb.Settings(init_timeout=wandb_client.TIMEOUT, login_timeout=wandb_client.TIMEOUT)
    try:
        run = wandb.init(**settings, settings=limits)
        # they tell the client of packages that are imported later: an error in any import once it is gone
        import_hooks.unregister_all_post_import_hooks()
        return run
    except Exception as error:
        why = reason(error)
        kill()
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        if settings.get("mode") != "offline" and is_no_answer(error):
            raise Unreachable(
                f"wandb.mode: no answer from {address} within {wandb_client.TIMEOUT:g} s ({why})"
            ) from error
        advice = (
            "delete wandb-id.txt in the run's folder for a new run there"
            if "deleted" in why
            else "check --wandb.project and --wandb.entity, run 'wandb login' or set WANDB_API_KEY, or set "
            "--wandb.mode to offline or disabled"
        )
        raise ValueError(f"wandb.mode: W&B cannot start ({why}): {advice}") from error


def end(run: Any, code: int, seconds: float, hurries: Callable[[], bool]) -> str | None:
    """End a run of W&B, and its client's process whether or not everything is sent.

    Args:
        run: The run.
        code: Exit code of ours, which W&B shows.
        seconds: How long to wait at most.
        hurries: Whether a signal came; from then on ``AT_SIGNAL`` is the limit.

    Returns:
        Why not everything was sent; None if it was.
    """
    import wandb

    log = Path(run.settings.log_internal)

    def finish() -> None:
        with suppress(Exception):  # its process is gone
            run.finish(exit_code=code)
            finished.append(True)
            wandb.teardown(exit_code=code)

    finished: list[bool] = []
    waiting = Thread(target=finish, name="wandb-finish", daemon=True)
    waiting.start()
    limit = time.monotonic() + seconds
    try:
        while waiting.is_alive() and time.monotonic() < limit:
            waiting.join(0.1)
            if hurries():
                limit = min(limit, time.monotonic() + AT_SIGNAL)
                hurries = _never
    finally:
        if waiting.is_alive() or not finished:
            kill()
    if finished:
        return _refusal(log)
    return "its process is gone" if time.monotonic() < limit else "no answer in time"


def image(path: Path, caption: str) -> Any:
    """Make an image of W&B's of a file."""
    import wandb

    return wandb.Image(str(path), caption=caption)


def _refusal(log: Path) -> str | None:
    """Return why the server refused rows, by the client's log: it drops them, and ends well."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    found = [line for line in lines if "HTTP error" in line and "/file_stream" in line]
    status = re.search(r'"status":(\d+)', found[-1]) if found else None
    return f"rows were refused with HTTP status {status[1]}" if status else None


def _never() -> bool:
    return False
