"""Processor time and memory of a call."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

Call = Callable[[], object]
_STATUS = Path("/proc/self/status")


def seconds(call: Call, repeats: int = 3) -> float:
    """Return the processor time of a call, the least of several: other work only adds to it."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def each(call: Call, count: int, repeats: int = 3) -> float:
    """Return the processor time of one of ``count`` calls in a row, for those too short for the clock."""

    def calls() -> None:
        for _ in range(count):
            call()

    return seconds(calls, repeats) / count


def traced(call: Call) -> float:
    """Return the most memory in MB that a call holds at a time, of Python and NumPy."""
    tracemalloc.start()
    try:
        kept = call()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak / 1e6


def resident(call: Call) -> float:
    """Return by how many MB a call raises the largest resident memory; tensors are in it. Linux alone."""
    before = memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    kept = call()
    peak = _of("VmHWM")
    del kept
    return max(0.0, peak - before)


def memory() -> float:
    """Return the resident memory of this process in MB."""
    return _of("VmRSS")


def _of(name: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"{_STATUS}: got no {name}, expected Linux")
