"""What is measured at several sizes, and how it grows with them: exponents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 0.3
"""What a fitted exponent may exceed the expected one by: caches, a logarithm, other work on the machine."""
NUM_FITTED = 3
"""The largest sizes alone decide: at small ones the fixed cost hides what grows."""
FLOORS = {"s": 2e-4, "MB": 0.5}
"""Smallest values that count: differences below them are those of the clock and of the allocator."""
WORDS = {0: "constant", 1: "linear"}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        name: What it is the cost of.
        of: What it may grow with.
        expected: Exponent that it should have: 0 is constant, 1 linear.
        unit: "s", "MB" or a count.
        sizes: Of ``of``, growing.
        measure: Takes a size, and returns the value.
        floor: Values below count as so much; None takes that of the unit.
    """

    name: str
    of: str
    expected: int
    unit: str
    sizes: Sequence[int]
    measure: Callable[[int], float]
    floor: float | None = None


@dataclass(frozen=True)
class Line:
    """How a case grows.

    Args:
        case: The case.
        values: One for each of its sizes.
    """

    case: Case
    values: Sequence[float]

    @property
    def exponent(self) -> float:
        """Slope of log(value) over log(size) at the largest sizes, by least squares."""
        floor = FLOORS.get(self.case.unit, 1.0) if self.case.floor is None else self.case.floor
        values = np.maximum(self.values[-NUM_FITTED:], floor)
        return slope(self.case.sizes[-NUM_FITTED:], values.tolist())

    @property
    def is_too_fast(self) -> bool:
        """Whether it grows faster than it should."""
        return self.exponent > self.case.expected + TOLERANCE

    def row(self) -> str:
        """Write it as a row of the table."""
        case, ends = self.case, (self.values[0], self.values[-1])
        sizes = f"{_size(case.sizes[0])} to {_size(case.sizes[-1])} {case.of}"
        values = " to ".join(f"{value:.3g}" for value in ends)
        verdict = "TOO FAST" if self.is_too_fast else "as expected"
        cells = (
            case.name,
            sizes,
            f"{values} {case.unit}",
            WORDS[case.expected],
            f"{self.exponent:.2f}",
            verdict,
        )
        return f"| {' | '.join(cells)} |"

    def as_json(self) -> dict[str, Any]:
        """Return it in primitives."""
        case = self.case
        points = [{"size": size, "value": value} for size, value in zip(case.sizes, self.values, strict=True)]
        return {
            "name": case.name,
            "of": case.of,
            "unit": case.unit,
            "expected": case.expected,
            "exponent": round(self.exponent, 3),
            "is_too_fast": self.is_too_fast,
            "points": points,
        }


HEADER = "| cost | with | from, to | should be | exponent | |\n|---|---|---|---|---|---|"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the exponent e of value = c size^e by least squares of the logarithms.

    Args:
        sizes: At least two different ones, above 0.
        values: Above 0.
    """
    x, y = np.log(sizes), np.log(values)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def grow(case: Case) -> Line:
    """Measure a case; once more where it grows too fast, and then take the smaller values."""
    line = Line(case, [case.measure(size) for size in case.sizes])
    if not line.is_too_fast:
        return line
    again = [case.measure(size) for size in case.sizes]
    return Line(case, [min(pair) for pair in zip(line.values, again, strict=True)])


def _size(size: int) -> str:
    digits = len(str(size)) - 1
    if digits < 4:
        return f"{size:,}"
    return f"10^{digits}" if size == 10**digits else f"{size:.2g}".replace("e+0", "e")
