"""Cost of a checkpoint for the step that it follows: ``python -m benchmarks.checkpoints``.

Writes the state of a model with AdamW and an average (four numbers per parameter) by Lightning's writers and
by ours, in turn, and reads it back.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO as LightningAsync

from ldm.checkpointing.async_writer import AsyncCheckpointIO
from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.io.checkpoint import verify

WRITERS: dict[str, Callable[[], Any]] = {
    "Lightning's": TorchCheckpointIO,
    "Lightning's, asynchronous": lambda: LightningAsync(TorchCheckpointIO()),
    "ours": AtomicCheckpointIO,
    "ours, asynchronous": AsyncCheckpointIO,
}


def state(num_parameters: int) -> dict[str, Any]:
    """Make what a run of so many parameters saves, in tensors of a million numbers."""
    count = max(1, num_parameters // 1_000_000)
    parts = ("state_dict", "shadow", "first", "second")
    return {part: {f"w{i}": torch.rand(1_000_000) for i in range(count)} for part in parts}


def write(make: Callable[[], Any], checkpoint: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Return the seconds that the caller waited, and those until the file was there."""
    io = make()
    started = time.perf_counter()
    io.save_checkpoint(checkpoint, folder / "last.ckpt")
    waited = time.perf_counter() - started
    io.teardown()
    return waited, time.perf_counter() - started


def measure(num_parameters: int, rounds: int, folder: Path) -> list[str]:
    """Return the rows of the table: medians over the rounds."""
    checkpoint = state(num_parameters)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WRITERS}
    for _ in range(rounds):
        for name, make in WRITERS.items():
            times[name].append(write(make, checkpoint, folder))
    base = statistics.median(waited for waited, _ in times["Lightning's"])
    return [row(name, measured, base) for name, measured in times.items()]


def row(name: str, measured: list[tuple[float, float]], base: float) -> str:
    """Write a row: medians, and the first as a ratio to ``base``."""
    waited, done = (statistics.median(column) for column in zip(*measured, strict=True))
    return f"| {name} | {waited:.2f} | {waited / base:.2f} | {done:.2f} |"


def main() -> None:
    """Print the table, and how fast a file is checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=1e8, help="Of the model.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="Where to write; default: a temporary one.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(int(options.parameters), options.rounds, Path(folder))
        path = Path(folder) / "last.ckpt"
        started = time.perf_counter()
        verify(path)
        seconds, size = time.perf_counter() - started, path.stat().st_size / 1e9
    print(f"{options.parameters:,.0f} parameters, {size:.2f} GB; seconds, medians of {options.rounds}\n")
    print("| writer | training waits | as a ratio | on the disk after |\n|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nchecksums compared in {seconds:.2f} s: {size / seconds:.1f} GB/s")


if __name__ == "__main__":
    main()
