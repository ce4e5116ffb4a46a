"""What may grow with the length of a run: memory, objects, open files, the step, its checkpoint, the log."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.growth.line import Case
from benchmarks.growth.measure import each, memory, seconds
from benchmarks.growth.runs import command
from ldm.loggers.metrics_csv import MetricsCSV

WIDTH = 8
MOST = 1_000.0
"""MB by which a run may grow: one that grows further ends, and is taken to grow on as it did."""
ROWS = (100, 1_000, 10_000, 100_000)
"""Of a log."""
SNAPSHOTS = 8
FLOORS = {"MB": 16.0, "objects": 200.0, "files": 8.0, "threads": 4.0, "s": 5e-3, "MB of checkpoint": 0.1}
"""Growth that does not count, by unit: pages that the allocator keeps, caches that fill."""
Figures = dict[str, float]


class Record(L.Callback):
    """Notes what a run holds after so many steps.

    Args:
        marks: Steps.
    """

    def __init__(self, marks: Sequence[int]) -> None:
        self.marks, self.found = marks, dict[int, Figures]()
        self._times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note it, and end a run that has grown too far."""
        self._times.append(time.process_time())
        step = len(self._times)
        grown = memory() - self.found[self.marks[0]]["MB"] if self.found else 0.0
        if step in self.marks or grown > MOST:
            self.found[step] = self._figures(Path(trainer.default_root_dir))
            self._times[-1] = time.process_time()
        trainer.should_stop = trainer.should_stop or grown > MOST

    def at(self, step: int, unit: str) -> float:
        """Return by how much a figure has grown between the first mark and a step."""
        first, last = self.marks[0], max(self.found)
        here = self.found[min(step, last)][unit]
        if unit == "s":
            return here
        return (here - self.found[first][unit]) * max(1.0, (step - first) / max(1, last - first))

    def _figures(self, run: Path) -> Figures:
        resident = memory()
        gc.collect()
        recent = self._times[len(self._times) // 2 :]
        last = run / "checkpoints" / "last.ckpt"
        return {
            "MB": resident,
            "objects": len(gc.get_objects()),
            "files": len(os.listdir("/proc/self/fd")) + len(list((run / "averages").glob("*"))),
            "threads": threading.active_count(),
            "s": statistics.median(b - a for a, b in itertools.pairwise(recent)),
            "MB of checkpoint": last.stat().st_size / 1e6 if last.exists() else 0.0,
        }


def train(folder: Path, marks: Sequence[int], more: Sequence[L.Callback] = ()) -> Record:
    """Train, with validations, checkpoints and snapshots of averages; return what was noted.

    Args:
        folder: For the run.
        marks: Steps; growth counts from the first on.
        more: Further callbacks.
    """
    averages = f"{{class_path: PostHocEMA, init_args: {{every_n_steps: 10, max_snapshots: {SNAPSHOTS}}}}}"
    options = [
        f"--trainer.val_check_interval={max(1, marks[0] // 2)}",
        "--trainer.limit_val_batches=2",
        "--model.sampler.num_steps=2",
        f"--trainer.log_every_n_steps={min(10, marks[0])}",
        f"--trainer.callbacks+={averages}",
    ]
    cli = command(folder, WIDTH, marks[-1], options)
    record = Record(marks)
    cli.trainer.callbacks += [*more, record]  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    return record


def _logged(folder: Path, rows: int) -> MetricsCSV:
    """Write a log of so many rows."""
    path = folder / f"log{rows}"
    path.mkdir(exist_ok=True)
    lines = "".join(f"{n},{64 * n},0.125,0.25\n" for n in range(rows))
    (path / "metrics.csv").write_text(f"step,samples,train/loss,train/norm\n{lines}")
    return MetricsCSV(str(path))


def _row(logger: MetricsCSV, step: int) -> None:
    logger.log_metrics({"samples": 64 * step, "train/loss": 0.125, "train/norm": 0.25}, step)


def _next_row(folder: Path, rows: int) -> float:
    logger = _logged(folder, rows)
    _row(logger, rows)
    return each(lambda: _row(logger, rows + 1), 100)


def _resumed(folder: Path, rows: int) -> float:
    logger = _logged(folder, rows)
    return seconds(lambda: _row(logger, rows), 1)


def cases(sizes: Sequence[int], folder: Path) -> list[Case]:
    """List what is measured.

    Args:
        sizes: Steps at which the run is looked at, growing; the first is its warm-up.
        folder: For the run.
    """
    run = cache(lambda: train(folder, sizes))

    def after(unit: str) -> Callable[[int], float]:
        return lambda step: run().at(step, unit)

    names = {
        "run: resident memory since the warm-up": "MB",
        "run: Python objects since the warm-up": "objects",
        "run: open files and snapshots since then": "files",
        "run: threads since the warm-up": "threads",
        "run: a step": "s",
        "run: its checkpoint since the warm-up": "MB of checkpoint",
    }
    return [
        *(Case(name, "steps", 0, unit, sizes[1:], after(unit), FLOORS[unit]) for name, unit in names.items()),
        Case("metrics.csv: the next row", "rows", 0, "s", ROWS, lambda n: _next_row(folder, n), 2e-4),
        Case(
            "metrics.csv: the first row of a resumed run", "rows", 1, "s", ROWS, lambda n: _resumed(folder, n)
        ),
    ]
