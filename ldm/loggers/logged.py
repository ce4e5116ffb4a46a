"""What a run's folder knows of what was logged: the rows of metrics.csv and the image grids, in order.

Each has a position, W&B's ``_step``: a function of optimizer steps, so that a resumed run and a later
``ldm.sync`` know from the server's last row alone which rows it lacks, and send none twice.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm.io.images import read_text

PER_STEP = 10
"""Positions of an optimizer step: values of training, then up to eight image grids, then of validation."""


@dataclass(frozen=True)
class Grid:
    """An image grid in a file.

    Args:
        panel: Name of its panel.
        path: The file.
        caption: Captions of its images, one a line.
    """

    panel: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Row:
    """Values that were logged together, or an image grid.

    Args:
        position: Its place among all rows.
        step: Optimizer steps done before the one that logged it.
        values: By name, with "samples" if it has that.
        grid: The grid.
    """

    position: int
    step: int
    values: dict[str, float]
    grid: Grid | None = None


def position_of_values(step: int, names: Iterable[str]) -> int:
    """Return the position of values that were logged after ``step`` optimizer steps and one more."""
    return PER_STEP * step + (PER_STEP - 1 if any(name.startswith("val/") for name in names) else 0)


def position_of_grid(step: int, order: int) -> int:
    """Return the position of an image grid by its order, from 0, in its step; from 7 on they share one."""
    return PER_STEP * step + 1 + min(order, PER_STEP - 3)


def logged(folder: Path) -> list[Row]:
    """List all rows of a run, in order."""
    return sorted(
        [*_values(folder / "metrics.csv"), *_grids(folder / "images")], key=lambda row: row.position
    )


def _values(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    for line in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        values = {name: float(value) for name, value in line.items() if name != "step" and value}
        if line["step"]:
            step = int(line["step"])
            yield Row(position_of_values(step, values), step, values)


def _grids(folder: Path) -> Iterator[Row]:
    for path in sorted(folder.glob("*.png")):
        text = read_text(path)
        if {"panel", "step", "order", "samples"} <= text.keys():
            step = int(text["step"])
            grid = Grid(text["panel"], path, text.get("captions", ""))
            values = {"samples": float(text["samples"])}
            yield Row(position_of_grid(step, int(text["order"])), step, values, grid)
