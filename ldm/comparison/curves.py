"""Curves of several runs as figures of Plotly: plain data, drawn by its script in the browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ldm.comparison.runs import ComparedRun, Points

MAX_POINTS = 400
"""Points of a curve: longer ones are averaged over equal stretches."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8B6F00", "#7F7F7F")
"""Told apart by the colour blind (Okabe & Ito 2008); the yellow of theirs is too light on white."""
DASHES = (("solid", "solid"), ("dash", "dashed"), ("dot", "dotted"))
"""Beyond the colours, dashes differ: as Plotly and as CSS name them."""
HIDDEN = (
    "train/step_seconds",
    "train/data_wait",
    "train/images_per_second_per_device",
    "train/time_forward",
    "train/time_backward",
    "train/time_optimizer",
    "train/gflop_per_sample",
    "train/memory_gib",
    "val/pairs",
)
"""Curves that do not concern a model, or repeat others."""
LAYOUT = {
    "hovermode": "x unified",
    "hoverdistance": -1,
    "hoverlabel": {"namelength": -1},
    "showlegend": False,
    "margin": {"l": 55, "r": 10, "t": 10, "b": 40},
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
}


def panels(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Make a panel per value, the same layout for all; training and validation of a value are in one.

    Beside Plotly's data and layout: the title, and ``positive``: whether a logarithmic axis shows all of it.
    """
    traces: dict[str, list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for name in sorted(run.curves.keys() - set(HIDDEN)):
            title = name.partition("/")[2] or name
            traces.setdefault(title, []).append(_trace(number, run, name))
    end = max((trace["x"][-1] for data in traces.values() for trace in data), default=0.0)
    layout = LAYOUT | {"xaxis": {"range": [0, max(end, 1.0) * 1.01], "title": {"text": "samples seen"}}}
    return [
        {
            "title": title,
            "data": traces[title],
            "layout": layout,
            "positive": min(min(trace["y"]) for trace in traces[title]) > 0,
        }
        for title in sorted(traces, key=_importance)
    ]


def shortened(points: Points, most: int = MAX_POINTS) -> Points:
    """Average a long curve over equally many neighbours; the last point stays the last sample seen."""
    size = math.ceil(len(points) / most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def line(number: int) -> dict[str, str]:
    """Return colour and dash of a run by its number on the page, and the dash as CSS names it."""
    dash, border = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "dash": dash, "border": border}


def _trace(number: int, run: ComparedRun, name: str) -> dict[str, Any]:
    is_val, points = name.startswith("val/"), shortened(run.curves[name])
    look = line(number)
    return {
        "name": escape(run.name) + (" (val)" if is_val else ""),  # Plotly reads HTML in it
        "meta": number,
        "x": [x for x, _ in points],
        "y": [float(f"{y:.6g}") for _, y in points],
        "mode": "lines+markers" if is_val else "lines",
        "opacity": 1.0 if is_val else 0.75,
        "line": {"color": look["color"], "dash": look["dash"], "width": 2 if is_val else 1.2},
        "hovertemplate": "%{y:.5~g} at %{x:,}",
    }


def _importance(title: str) -> tuple[int, str]:
    """Put the loss first, and what concerns the machine last."""
    return (0 if title == "loss" else 2 if "per_second" in title else 1, title)
