"""A callback that notes the time of steps, for runs of the benchmark in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L


class Clock(L.Callback):
    """Writes seconds of this process's processor time, and of wall time, between the ends of two steps.

    Args:
        file: Where to, a line a step, at the end.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self._times: list[tuple[float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note both, always at the same place of a step."""
        self._times.append((time.process_time(), time.perf_counter()))

    def on_train_end(self, *_: Any) -> None:
        """Write them."""
        pairs = zip(self._times[:-1], self._times[1:], strict=True)
        lines = [f"{after[0] - before[0]} {after[1] - before[1]}" for before, after in pairs]
        self.file.write_text("\n".join(lines), encoding="utf-8")


class Slow(L.Callback):
    """Makes a step last for some time, so that a kill meets training. Reads BENCHMARK_STEP_SECONDS."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Wait."""
        time.sleep(float(os.environ["BENCHMARK_STEP_SECONDS"]))
