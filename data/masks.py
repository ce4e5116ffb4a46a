"""Random masks to train inpainting with: a rectangle or a brush stroke, a function of a name."""

from __future__ import annotations

import hashlib
import random

import numpy as np
from numpy.typing import NDArray

SMALLEST, LARGEST = 0.1, 0.5
"""Fraction of the image that a mask covers."""


def random_mask(name: str, height: int, width: int) -> NDArray[np.uint8]:
    """Draw a mask: a rectangle half of the time, a brush stroke otherwise.

    Args:
        name: Decides the mask, whatever else is drawn.
        height: Rows.
        width: Columns.

    Returns:
        (height, width), 255 where it is to be painted, which is ``SMALLEST`` to ``LARGEST`` of it, else 0.
    """
    digest = hashlib.sha256(f"mask/{name}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:16], "big"))
    while True:  # small images round shares a little: draw again
        mask = _rectangle(rng, height, width) if rng.random() < 0.5 else _stroke(rng, height, width)
        if SMALLEST <= mask.mean() <= LARGEST:
            return np.asarray(mask * np.uint8(255), np.uint8)


def _rectangle(rng: random.Random, height: int, width: int) -> NDArray[np.bool_]:
    area = SMALLEST + rng.random() * (LARGEST - SMALLEST)
    longest = min(1.0, area / 0.3)  # sides of at least 0.3
    across = 0.3 + rng.random() * (longest - 0.3) if longest > 0.3 else area**0.5
    sides = (area / across, across)
    mask = np.zeros((height, width), bool)
    top, left = (_spot(rng) * (1 - side) for side in sides)
    rows = slice(round(top * height), round((top + sides[0]) * height))
    columns = slice(round(left * width), round((left + sides[1]) * width))
    mask[rows, columns] = True
    return mask


def _stroke(rng: random.Random, height: int, width: int) -> NDArray[np.bool_]:
    """Move a round brush until a random fraction is covered; lengths are fractions of the sides."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    covered = SMALLEST + rng.random() * (0.8 * LARGEST - SMALLEST)
    radius = 0.06 + 0.06 * rng.random()
    start = (_spot(rng), _spot(rng))
    mask = np.zeros((height, width), bool)
    while mask.mean() < covered:
        end = (_spot(rng), _spot(rng))
        mask |= _distance(y, x, start, end) <= radius
        start = end
    return mask


def _spot(rng: random.Random) -> float:
    """Draw a coordinate in [0, 1], in 2 of 7 cases an end: else corners would hardly ever be covered."""
    return min(1.0, max(0.0, 1.4 * rng.random() - 0.2))


def _distance(
    y: NDArray[np.float64], x: NDArray[np.float64], a: tuple[float, float], b: tuple[float, float]
) -> NDArray[np.float64]:
    """Return the distance of points (y, x) to the segment from ``a`` to ``b``."""
    dy, dx = b[0] - a[0], b[1] - a[1]
    along = ((y - a[0]) * dy + (x - a[1]) * dx) / max(dy * dy + dx * dx, 1e-12)
    along = along.clip(0.0, 1.0)
    return np.asarray(np.hypot(y - a[0] - along * dy, x - a[1] - along * dx))
