"""Output of ``ldm.evaluate``: a table, JSON, ADM's .npz, and the curve of distance against agreement."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldm import __version__
from ldm.evaluation.session import Measurement, Value
from ldm.io.atomic import replacing, sweep, write_text
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.metric import Metadata
from ldm.metrics.reference import SUFFIX, write_arrays


@dataclass(frozen=True)
class Result:
    """Values of one candidate.

    Args:
        name: Its name.
        series: Candidates of one series are joined in the plot.
        metadata: Settings of its images.
        values: The numbers.
    """

    name: str
    series: str
    metadata: Metadata
    values: list[Value]

    def value(self, prefix: str) -> float | None:
        """Return the first value of a measure, or None."""
        return next((v.value for v in self.values if v.name.startswith(f"{prefix}/")), None)


class OutputFolder:
    """Folder of results. Files of an earlier call are renamed, to ``<name>-1.json`` and so on.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        taken = (number for number in count(1) if not (folder / f"evaluation-{number}.json").exists())
        self._number = next(taken)
        sweep(folder)
        self._own: set[str] = set()

    def path(self, name: str) -> Path:
        """Return the path of a file to write."""
        path = self.folder / name
        if name not in self._own and path.exists():
            kept = path.with_stem(f"{path.stem}-{self._number}")
            path.replace(kept)
            print(f"{path} of an earlier call is now {kept}")
        self._own.add(name)
        return path


def table(results: Sequence[Result]) -> str:
    """Lay results out as Markdown, a row for each candidate and a column for each number."""
    names = list(dict.fromkeys(value.name for result in results for value in result.values))
    lines = [_row(["", *names]), _row(["---"] * (len(names) + 1))]
    for result in results:
        found = {value.name: f"{value.value:.6g}" for value in result.values}
        lines.append(_row([result.name, *(found.get(name, "") for name in names)]))
    return "\n".join(lines)


def write_json(path: Path, results: Sequence[Result], is_complete: bool) -> None:
    """Write every number with its record, and whether those of all candidates are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [
        {
            "candidate": result.name,
            "drawn": result.metadata,
            "values": [value.record({}) for value in result.values],
        }
        for result in results
    ]
    record = {"software": f"ldm {__version__}", "is_complete": is_complete, "results": found}
    write_text(path, json.dumps(record, indent=2) + "\n")


def write_npz(path: Path, images: Tensor, measurement: Measurement, size: int) -> None:
    """Write images and the statistics of their Inception features as ADM's evaluation reads them.

    Args:
        path: The file.
        images: (N, H, W, C) uint8 or uint16.
        measurement: What measured them, before it ends.
        size: Side of the images.
    """
    arrays: dict[str, Any] = {"arr_0": images.numpy()}
    for metric in measurement.metrics:
        if isinstance(metric, FeatureMetrics) and metric.extractor.name == "inception":
            for view in SUFFIX.keys() & metric.generated.moments.keys():
                gaussian = metric.generated.gaussian(view)
                arrays[f"mu{SUFFIX[view]}"] = gaussian.mean.numpy()
                arrays[f"sigma{SUFFIX[view]}"] = gaussian.covariance.numpy()
            record = {**metric.extractor.metadata(), "num": metric.generated.count, "size": size}
            arrays["record"] = np.array(json.dumps(record))
    write_arrays(path, arrays)


def plot(path: Path, results: Sequence[Result]) -> bool:
    """Draw Fréchet distance against CLIP score, one line per series; return whether there was one to draw.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    found = [(result, result.value("clip_score"), result.value("fid")) for result in results]
    points = [(r, x, y) for r, x, y in found if x is not None and y is not None]
    if len(points) < 2:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("the curve needs matplotlib: pip install 'ldm[plots]'") from error
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="CLIP score", ylabel="Fréchet distance")
    for series in dict.fromkeys(result.series for result, _, _ in points):
        mine = [(r, x, y) for r, x, y in points if r.series == series]
        axes.plot([x for _, x, _ in mine], [y for _, _, y in mine], marker="o", label=series)
        for result, x, y in mine:
            axes.annotate(result.name.removeprefix(series).strip(), (x, y), fontsize=6)
    axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return True


def slug(name: str) -> str:
    """Turn a candidate's name into one that a file may have."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "-", name).strip("-.") or "images"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
