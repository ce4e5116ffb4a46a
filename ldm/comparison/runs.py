"""Run folders, read without torch: settings, environment, curves, images, evaluation records."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.io.artifacts import is_reference, run_folder_of
from ldm.runs.settings import flat

Points = list[tuple[float, float]]
"""(samples seen, value), in order."""


@dataclass(frozen=True)
class EvaluationRecord:
    """A value and how it was obtained, by ``evaluations.jsonl``: empty for what validation logs alone."""

    value: float
    record: dict[str, str]


@dataclass(frozen=True)
class ComparedRun:
    """One run.

    Args:
        name: Its name on the page.
        settings: Its resolved configuration, dotted key to value.
        environment: Versions and hardware, the same way.
        curves: Values over samples seen, by name.
        images: Image grids: kind (the file's name before the number) to samples seen to file.
        records: Last record of each value that has one.
        directions: "min" or "max", whichever is better, of each value where that is known.
    """

    name: str
    settings: dict[str, str]
    environment: dict[str, str]
    curves: dict[str, Points]
    images: dict[str, dict[int, Path]]
    records: dict[str, EvaluationRecord]
    directions: dict[str, str]

    @property
    def last(self) -> dict[str, EvaluationRecord]:
        """The last value of each validation curve, with its record where there is one."""
        ends = {name: points[-1][1] for name, points in self.curves.items() if name.startswith("val/")}
        return {name: self.records.get(name, EvaluationRecord(end, {})) for name, end in ends.items()}


def read_runs(folders: Sequence[str]) -> list[ComparedRun]:
    """Read run folders, or artifacts of runs in W&B.

    Raises:
        ValueError: If one is no run folder, or a file of it is damaged; the message names it.
    """
    paths = [Path(folder) for folder in folders]
    found = [run_folder_of(folder) if is_reference(folder) else Path(folder) for folder in folders]
    return [_read(path, name) for path, name in zip(found, _names(paths), strict=True)]


def differing(tables: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Keep the keys whose values differ: key to one value per table, "" where it is missing."""
    rows = {key: [table.get(key, "") for table in tables] for key in sorted(set().union(*tables))}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _read(folder: Path, name: str) -> ComparedRun:
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.csv").is_file():
        raise ValueError(
            f"'{folder}' is no run folder: expected config.yaml and metrics.csv, as ldm.fit leaves them"
        )
    settings = _shown(_load(folder / "config.yaml"))
    settings.pop("run", None)  # the folder itself: it always differs
    environment = _shown(_load(folder / "environment.json"))
    curves, records = _curves(folder / "metrics.csv"), _records(folder / "evaluations.jsonl")
    images, directions = _images(folder / "images"), _load(folder / "metrics.json")
    return ComparedRun(name, settings, environment, curves, images, records, directions)


def _names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the fewest last components of its path that distinguish all."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"got the run '{folders[0]}' twice, expected different ones")


def _load(path: Path) -> Any:
    """Read YAML, which includes JSON; an absent file is empty."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def _shown(settings: Any) -> dict[str, str]:
    return {name: str(value) for name, value in flat(settings)}


def _curves(path: Path) -> dict[str, Points]:
    """Read every column over samples seen; what is not finite, or cut short by a crash, is left out."""
    curves: dict[str, Points] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for row in csv.DictReader(lines, restkey="", restval=""):
        seen = _number(row.pop("samples", ""))
        for name, text in row.items():
            value = _number(text)
            if name not in ("step", "") and math.isfinite(value) and math.isfinite(seen):
                curves.setdefault(name, []).append((seen, value))
    return curves


def _number(text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _images(folder: Path) -> dict[str, dict[int, Path]]:
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d+)\.png", path.name):
            found.setdefault(match[1], {})[int(match[2])] = path
    return found


def _records(path: Path) -> dict[str, EvaluationRecord]:
    records: dict[str, EvaluationRecord] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if "name" in fields and isinstance(fields.get("value"), int | float):
            record = {k: str(v) for k, v in fields.items() if k not in ("name", "value")}
            records[fields["name"]] = EvaluationRecord(float(fields["value"]), record)
    return records
