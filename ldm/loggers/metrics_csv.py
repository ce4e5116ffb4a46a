"""All metrics of a run in one CSV file, which a resumed run continues."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ldm.io.atomic import replacing, write_text
from ldm.loggers.directions import Directions, no_directions

Row = dict[str, str]
FIRST = ["step", "samples"]


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row per log call, at once on the disk, a column per metric.

    A resumed run drops the rows that the interrupted one wrote after the checkpoint, so that no step
    is there twice. A new metric rewrites the file with one more column. ``metrics.json`` has
    "min" or "max" for each metric whose best value is known to be its smallest or largest.

    Args:
        save_dir: Folder of the run.
        directions: Looks them up.
    """

    def __init__(self, save_dir: str, directions: Directions = no_directions) -> None:
        super().__init__()
        self._directions = directions
        self._folder = Path(save_dir)
        self._columns: list[str] | None = None

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / "metrics.csv"

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Version of the logger: there is one file per run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Leave the configuration to the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: Values by name. "epoch" is left out: training counts in samples.
            step: Optimizer steps done before this one.
        """
        values = {"step": step or 0, **{k: v for k, v in metrics.items() if k != "epoch"}}
        row = {name: format_value(value) for name, value in values.items()}
        if self._columns is None:
            self._columns = self._resume(row)
        missing = sorted(row.keys() - set(self._columns))
        if missing:
            self._columns = self._columns + missing
            self._rewrite(_read(self.path), self._columns)
            known = {name: end for name, end in self._directions().items() if name in self._columns}
            if known:
                write_text(self._folder / "metrics.json", json.dumps(known, indent=2) + "\n")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _resume(self, first: Row) -> list[str]:
        rows = _read(self.path)
        columns = list(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
        self._rewrite(list(takewhile(lambda row: not _is_later(row, first), rows)), columns)
        return columns

    def _rewrite(self, rows: list[Row], columns: list[str]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _is_later(row: Row, first: Row) -> bool:
    """Whether ``row`` is the first row of a resumed run or of a later step; what follows it is later, too.

    The row of a validation comes after that of the last step before it, and has the same step.
    """
    step, resumed, found = (
        int(row["step"]),
        int(first["step"]),
        {name for name, value in row.items() if value},
    )
    is_same = found == first.keys() or (_is_validation(found) and _is_validation(first))
    return step > resumed or (step == resumed and is_same)


def _is_validation(names: Iterable[str]) -> bool:
    return any(name.startswith("val/") for name in names)


def _read(path: Path) -> list[Row]:
    """Read the rows; a last line cut short by a crash is dropped."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(lines) if row["step"]]


def format_value(value: float) -> str:
    """Print counts as integers, and others with the nine digits that distinguish all float32 values."""
    value = float(value)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.9g}"
