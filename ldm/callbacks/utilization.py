"""Utilization of a device by training, and the time of its phases."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.hardware import matmul_rate

PHASES = ("forward", "backward", "optimizer")
GIB = 2**30


class Utilization:
    """Counts the arithmetic of the first batch, times the phases of some batches, and never waits.

    Args:
        device: Where training computes.
        dtype: What it computes in; the peak of matrix products in it is measured now.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.peak = matmul_rate(dtype, device)
        self.flops_per_sample: float | None = None
        self._counter: FlopCounterMode | None = None
        self._marks: list[torch.cuda.Event | float] = []
        self._fractions: dict[str, float] = {}

    def begin(self, is_timed: bool) -> None:
        """Begin a batch; one that is timed is timed by the device."""
        if self.flops_per_sample is None:
            self._counter = FlopCounterMode(display=False)
            self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
            self._counter.__enter__()
        if is_timed:
            self._read()
            self._marks = []
            self.mark()

    def mark(self) -> None:
        """End a phase of a batch that is timed."""
        if self.device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def end_passes(self, num_samples: int | None = None) -> None:
        """End the forward and the backward pass; without the number of samples, because of an error."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            if num_samples is not None:
                self.flops_per_sample = self._counter.get_total_flops() / num_samples
            self._counter = None

    def values(self, rate: float) -> dict[str, float]:
        """Return what is logged.

        Args:
            rate: Samples per second of this device.
        """
        found = {f"train/time_{name}": fraction for name, fraction in self._fractions.items()}
        if self.flops_per_sample is not None:
            found["train/mfu"] = self.flops_per_sample * rate / self.peak
            found["train/gflop_per_sample"] = self.flops_per_sample / 1e9
        if self.device.type == "cuda":
            found["train/memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        return found

    def _read(self) -> None:
        """Compute the shares of the batch before, which the device is long done with."""
        if len(self._marks) == len(PHASES) + 1:
            seconds = [_between(*two) for two in pairwise(self._marks)]
            self._fractions = {name: s / sum(seconds) for name, s in zip(PHASES, seconds, strict=True)}


class _NoModules:
    """In place of the counter's tracker of modules: its hooks refuse ``torch.autograd.grad`` in forward.

    ``R1`` calls it there. Only the total is read.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *args: object) -> None:
        """Have nothing to undo."""


def _between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return float(first.elapsed_time(second))
    assert isinstance(first, float) and isinstance(second, float)
    return second - first
