"""The logged value whose best checkpoint is kept."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from textwrap import shorten

import lightning as L

from ldm.loggers.directions import Direction, directions


def check_monitor(trainer: L.Trainer, monitor: str, mode: Direction | None) -> None:
    """Check that something states that it logs a value; if ``mode`` is given, only warn of a misspelt one.

    Raises:
        ValueError: If nothing does and ``mode`` is None.
    """
    known = directions(trainer)
    if monitor in known:
        return
    close = get_close_matches(monitor, known, n=1, cutoff=0.8 if mode else 0.0)
    text = f"checkpoints.monitor: got '{monitor}', which nothing states that it logs, expected e.g. "
    text += f"{' or '.join(close) or 'val/loss'}, or another value with checkpoints.mode min or max"
    if mode is None:
        raise ValueError(text)
    if close and trainer.is_global_zero:
        warn(text)


def monitored(trainer: L.Trainer, monitor: str, step: int) -> float | None:
    """Return a value that the validation of ``step`` logged, or None with a warning if it did not."""
    if monitor in trainer.callback_metrics:
        return float(trainer.callback_metrics[monitor])
    logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
    if trainer.is_global_zero:
        warn(
            f"step {step}: checkpoints.monitor: '{monitor}' was not logged, expected one of "
            f"{shorten(logged, 120)}; best.ckpt stays as it is"
        )
    return None


def warn(line: str) -> None:
    """Print a warning."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
