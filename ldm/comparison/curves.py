"""Curves of several runs in one panel of SVG, drawn without a library so that the page needs none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ldm.comparison.runs import Points

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 26
MOST = 400
"""Points of a curve: longer ones are averaged over equal stretches."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8B6F00", "#7F7F7F")
"""Told apart by the colour blind (Okabe & Ito 2008); the yellow of theirs is too light on white."""
DASHES = ("", "7 3", "2 3")
"""Beyond the colours, strokes differ."""


@dataclass(frozen=True)
class Curve:
    """One curve.

    Args:
        run: Number of the run on the page, which chooses the stroke.
        name: Name of the run.
        points: (samples seen, value), in order.
        is_validation: Drawn with dots; training is drawn thin.
    """

    run: int
    name: str
    points: Points
    is_validation: bool


def stroke(run: int) -> str:
    """Return the SVG attributes of a run's lines."""
    dash = DASHES[run // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[run % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def panel(title: str, curves: Sequence[Curve], end: float) -> str:
    """Draw one panel: linear, and logarithmic where all values are positive; the page shows one of them.

    Args:
        title: Name of the value.
        curves: At least one, with at least one point each.
        end: Samples seen at the right edge, the same in all panels.
    """
    shown = [Curve(c.run, c.name, shortened(c.points), c.is_validation) for c in curves]
    values = [y for curve in shown for _, y in curve.points]
    scales = ["linear"] + (["log"] if min(values) > 0 and max(values) > min(values) else [])
    drawings = "".join(_drawing(shown, scale, max(end, 1.0)) for scale in scales)
    kind = "has-log" if "log" in scales else ""
    return f'<figure class="panel {kind}"><figcaption>{escape(title)}</figcaption>{drawings}</figure>'


def shortened(points: Points, most: int = MOST) -> Points:
    """Average a long curve over equally many neighbours; the last point stays the last sample seen."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Choose round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Write a number in few letters: 12000 as 12k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _drawing(curves: Sequence[Curve], scale: str, end: float) -> str:
    ys = [y for curve in curves for _, y in curve.points]
    low, high = _bounds(ys, scale)
    place_y = _placer(low, high, HEIGHT - BOTTOM, TOP, scale)
    place_x = _placer(0.0, end, LEFT, WIDTH - RIGHT, "linear")
    marks = ticks(low, high) if scale == "linear" else _decades(low, high)
    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        for y in marks
    ]
    grid += [
        f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>'
        for x in ticks(0.0, end)
    ]
    lines = "".join(_line(curve, place_x, place_y) for curve in curves)
    data = f'data-left="{LEFT}" data-right="{WIDTH - RIGHT}" data-end="{end:g}"'
    return (
        f'<svg class="{scale}" viewBox="0 0 {WIDTH} {HEIGHT}" {data} role="img">{"".join(grid)}{lines}</svg>'
    )


def _line(curve: Curve, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    where = [(place_x(x), place_y(y)) for x, y in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
    name = escape(f"{curve.name}{' (val)' if curve.is_validation else ''}", quote=True)
    points = escape(json.dumps([[x, float(f"{y:.6g}")] for x, y in curve.points]), quote=True)
    kind = "val" if curve.is_validation else "train"
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in where if curve.is_validation)
    fill = COLOURS[curve.run % len(COLOURS)]
    return (
        f'<g class="curve {kind} run-{curve.run}" data-name="{name}" data-points="{points}" fill="{fill}" '
        f'{stroke(curve.run)}><polyline fill="none" points="{path}"/>{dots}</g>'
    )


def _bounds(ys: Sequence[float], scale: str) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if scale == "log":
        return low, high
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _placer(low: float, high: float, start: float, stop: float, scale: str) -> Callable[[float], float]:
    """Map [low, high] to [start, stop] pixels."""
    measure = math.log if scale == "log" else float
    a, b = measure(low), measure(high)
    return lambda value: start + (stop - start) * (measure(value) - a) / (b - a)


def _decades(low: float, high: float) -> list[float]:
    """Choose marks of a logarithmic axis: 1, 2 and 5 times powers of ten, or fewer over many decades."""
    factors = (1, 2, 5) if high / low < 1e3 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [mark for mark in marks if low <= mark <= high] or [low, high]
