"""Small runs of ``ldm.fit`` on digits, to measure."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import overhead
from data.digits import main as pack
from ldm.training import FitCLI


def command(folder: Path, width: int, steps: int, more: list[str]) -> FitCLI:
    """Build a run of the overhead benchmark's U-Net; digits are packed into ``folder`` if they are not there.

    Args:
        folder: For shards and the run.
        width: Channels of the U-Net's first level.
        steps: Optimizer steps.
        more: Further options of ``ldm.fit``.
    """
    if not (folder / "shards").exists():
        pack(["--out", str(folder / "shards")])
    options = argparse.Namespace(width=width, batch=1, optimizer="AdamW", accelerator="cpu", set=more)
    return overhead.command(folder, options, steps, width)
