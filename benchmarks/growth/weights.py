"""What may grow with parameters: building, optimizer, averages, a run of one step, and its checkpoint."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.growth.line import Case
from benchmarks.growth.measure import resident, seconds
from benchmarks.growth.runs import command
from ldm.callbacks.ema import averaged_parameters
from ldm.checkpointing.writer import LAST, AtomicCheckpointIO
from ldm.nets.unet import UNet
from ldm.training import FitCLI
from ldm.types import DenoiserDims

STEPS = 2
"""Of a run: the first makes the optimizer's state."""


def network(width: int) -> UNet:
    """Make the U-Net of the runs."""
    return UNet(DenoiserDims(1), (width, 2 * width), 2, (False, False), norm_groups=2)


def count(width: int) -> int:
    """Count its parameters, without their memory."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in network(width).parameters())


def width_of(parameters: int) -> int:
    """Return the width, in steps of 8, whose U-Net has about so many parameters: its square counts."""
    return max(8, 8 * round(16 * math.sqrt(parameters / count(128))))


class Runs:
    """Runs of U-Nets, one for each width.

    Args:
        folder: For shards, runs and checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, width: int) -> FitCLI:
        """Build a run, anew."""
        shutil.rmtree(self.folder / f"run{width}", ignore_errors=True)
        return command(self.folder, width, STEPS, [])

    def fit(self, width: int) -> Path:
        """Train; return the checkpoint."""
        cli = self.build(width)
        cli.trainer.fit(cli.model, cli.datamodule)
        return self.folder / f"run{width}" / "checkpoints" / LAST

    @cache  # noqa: B019  (one for a command)
    def checkpoint(self, width: int) -> Path:
        """Return the checkpoint of a run that was trained before."""
        path = self.folder / f"run{width}" / "checkpoints" / LAST
        return path if path.exists() else self.fit(width)


def optimized(stage: Any) -> Callable[[], Any]:
    """Return what builds the optimizer and takes its first step, and gives it back."""
    for weight in stage.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None

    def step() -> Any:
        optimizer = stage.optimizer.build(stage)
        optimizer.step()
        return optimizer

    return step


def averaged(stage: Any) -> float:
    """Return seconds of one update of the average of all trained weights."""
    weights = [weight.detach() for weight in averaged_parameters(stage).values()]
    shadow = [weight.clone() for weight in weights]
    return seconds(lambda: torch._foreach_lerp_(shadow, weights, 0.01))


def cases(sizes: Sequence[int], folder: Path) -> list[Case]:
    """List what is measured.

    Args:
        sizes: Parameters, growing; each about so many.
        folder: For the runs.
    """
    runs = Runs(folder)
    widths = {count(width): width for width in map(width_of, sizes)}

    def case(name: str, expected: int, unit: str, of: Callable[[int], float], floor: float) -> Case:
        found = list(widths)
        return Case(name, "parameters", expected, unit, found, lambda number: of(widths[number]), floor)

    def written(width: int) -> float:
        io, checkpoint = AtomicCheckpointIO(), torch.load(runs.checkpoint(width), weights_only=True)
        return seconds(partial(io.save_checkpoint, checkpoint, folder / "written" / LAST), 2)

    def loaded(width: int) -> float:
        path = runs.checkpoint(width)
        return seconds(lambda: AtomicCheckpointIO().load_checkpoint(path), 2)

    def size(width: int) -> float:
        return runs.checkpoint(width).stat().st_size / 1e6

    return [
        case(
            "run of two steps: memory, building included", 1, "MB", lambda w: resident(lambda: runs.fit(w)), 1
        ),
        case("checkpoint: size", 1, "MB", size, 0.1),
        case("checkpoint: write", 1, "s", written, 1e-2),
        case("checkpoint: verify and read", 1, "s", loaded, 1e-2),
        case("network on no device", 0, "s", lambda w: seconds(lambda: count(w)), 1e-3),
        case("network: build", 1, "s", lambda w: seconds(lambda: network(w), 1), 1e-3),
        case(
            "optimizer: build and first step",
            1,
            "s",
            lambda w: seconds(optimized(runs.build(w).model), 1),
            1e-3,
        ),
        case("optimizer: memory", 1, "MB", lambda w: resident(optimized(runs.build(w).model)), 1),
        case("average: an update", 1, "s", lambda w: averaged(runs.build(w).model), 1e-3),
    ]
