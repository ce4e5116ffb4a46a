"""Read an image of shapes back, and hold it against a caption.

The background is the median of the border; objects are connected regions that differ from it; each takes the
nearest named colour, and the shape and size of the best fitting template over radius and sub-pixel centre.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MIRRORED,
    POSITIONS,
    SHAPES,
    SIZES,
    Description,
    Outline,
    Thing,
    coverage,
)
from ldm.io.images import to_bytes
from ldm.metrics.metric import MeansMetric
from ldm.types import Batch

FIELDS = ("count", "colour", "shape", "size", "position", "background", "all")

_MIN_CONTRAST = 45  # levels; the weakest named contrast, purple on grey, has 72 after jitter
_MIN_AREA = 0.01  # of the canvas: half of the smallest object
_RADII = np.array([0.13, 0.14, 0.15, 0.195, 0.205, 0.215, 0.225])
_STEPS_PER_PIXEL = 4

_TWO = re.compile(r"a (\w+) (\w+) (\w+) (left of|right of|above|below) a (\w+) (\w+) (\w+)")
_ONE = re.compile(r"a (\w+) (\w+) (\w+) (in the .+)")
_BACKGROUND = re.compile(r" on a (\w+) background$")


@dataclass(frozen=True)
class Found:
    """One object of an image.

    Args:
        thing: What it is.
        x: Centre as a fraction of the canvas, to the right.
        y: Centre as a fraction of the canvas, downward.
    """

    thing: Thing
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """Content of an image.

    Args:
        background: A key of ``BACKGROUNDS``.
        found: The objects, in no particular order.
    """

    background: str
    found: tuple[Found, ...]


def parse(caption: str) -> Description:
    """Understand any wording of a caption.

    Returns:
        The description in canonical order; its background is None if the caption names none.

    Raises:
        ValueError: If it is no caption of shapes.
    """
    named = _BACKGROUND.search(caption)
    background = named[1] if named else None
    text = caption[: named.start()] if named else caption
    if two := _TWO.fullmatch(text):
        things = (Thing(*two.group(1, 2, 3)), Thing(*two.group(5, 6, 7)))
        canonical = {mirrored: relation for relation, mirrored in MIRRORED.items()}
        if two[4] in canonical:
            return Description(things[::-1], canonical[two[4]], background)
        return Description(things, two[4], background)
    if (one := _ONE.fullmatch(text)) and one[4] in POSITIONS:
        return Description((Thing(*one.group(1, 2, 3)),), one[4], background)
    raise ValueError(
        f"got the caption '{caption}', expected one of shapes, e.g. 'a large red ring in the center'"
    )


def read(image: NDArray[np.uint8]) -> Reading:
    """Read an image.

    Args:
        image: (H, H, 3) uint8.
    """
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    difference = np.abs(pixels - ground).max(-1)
    found = [_identify(pixels, ground, region) for region in _objects(difference)]
    return Reading(_nearest(BACKGROUNDS, ground), tuple(found))


def score(image: NDArray[np.uint8], caption: str) -> dict[str, bool]:
    """Compare an image with a caption; two objects are matched with those named as well as they can be.

    Args:
        image: (H, H, 3) uint8.
        caption: Any wording.

    Returns:
        ``FIELDS``: count; colour, shape and size, each of all objects; position: of one, or the
        relation of two; background, right where the caption names none; all. With a wrong count only the
        background can be right.
    """
    wanted, reading = parse(caption), read(image)
    result = dict.fromkeys(FIELDS, False)
    result["background"] = wanted.background in (None, reading.background)
    result["count"] = len(reading.found) == len(wanted.things)
    if result["count"]:
        matches = [_compare(wanted, order) for order in permutations(reading.found)]
        best: dict[str, bool] = max(matches, key=_merit)
        result |= best
    result["all"] = all(result[field] for field in FIELDS if field != "all")
    return result


class CaptionAccuracy(MeansMetric):
    """Fraction of images that agree with their captions, attribute by attribute.

    Args:
        name: Prefix of the values: name/count, name/colour, ..., name/all.
    """

    def __init__(self, name: str = "caption") -> None:
        super().__init__([f"{name}/{field}" for field in FIELDS], higher_is_better=True)

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
        scores = [score(image, text) for image, text in zip(pixels, batch["text"], strict=True)]
        for name, field in zip(self.names, FIELDS, strict=True):
            self.add(name, Tensor([row[field] for row in scores]))


def _compare(wanted: Description, order: Sequence[Found]) -> dict[str, bool]:
    pairs = list(zip(wanted.things, (found.thing for found in order), strict=True))
    return {
        "colour": all(a.colour == b.colour for a, b in pairs),
        "shape": all(a.shape == b.shape for a, b in pairs),
        "size": all(a.size == b.size for a, b in pairs),
        "position": _where(order) == wanted.where,
    }


def _merit(result: dict[str, bool]) -> tuple[int, bool]:
    # objects are matched by what they are; positions break ties
    return sum(result[field] for field in ("colour", "shape", "size")), result["position"]


def _where(order: Sequence[Found]) -> str:
    first, last = order[0], order[-1]
    if len(order) == 1:
        return min(
            POSITIONS, key=lambda p: (POSITIONS[p][0] - first.x) ** 2 + (POSITIONS[p][1] - first.y) ** 2
        )
    dx, dy = last.x - first.x, last.y - first.y
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _nearest(palette: dict[str, tuple[int, int, int]], rgb: NDArray[Any]) -> str:
    return min(palette, key=lambda name: float(((np.array(palette[name]) - rgb) ** 2).sum()))


def _objects(difference: NDArray[Any]) -> Iterator[NDArray[np.bool_]]:
    """Find regions; a second threshold, half of each one's own contrast, separates objects that touch."""
    smallest = _MIN_AREA * difference.size
    for coarse in _components(difference > _MIN_CONTRAST):
        if coarse.sum() < smallest:
            continue
        own = np.percentile(difference[coarse], 75)
        for fine in _components(coarse & (difference > max(_MIN_CONTRAST, own / 2))):
            if fine.sum() >= smallest:
                yield fine


def _components(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    left = mask.copy()
    while left.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(left.argmax(), mask.shape)] = True
        size = 0
        while (grown := int(region.sum())) > size:
            size = grown
            region = _dilate(region) & left
        left &= ~region
        yield region


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _identify(pixels: NDArray[Any], ground: NDArray[Any], region: NDArray[np.bool_]) -> Found:
    away = np.abs(pixels - ground).max(-1)
    core = region & (away >= np.percentile(away[region], 40))
    rgb = np.median(pixels[core], axis=0)
    axis = rgb - ground
    # how far each pixel lies on the way from background to colour: the share that the object covers
    covered = np.clip((pixels - ground) @ axis / max(float(axis @ axis), 1e-9), 0.0, 1.0) * _dilate(region)
    shape, radius, x, y = _fit(covered)
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    return Found(Thing(size, _nearest(COLOURS, rgb), shape), x, y)


def _fit(covered: NDArray[Any]) -> tuple[str, float, float, float]:
    """Find the template of least squared error: shape, radius and centre, as fractions of the canvas."""
    size = len(covered)
    templates, names, offsets, half = _templates(size)
    rows, columns = (np.nonzero((covered > 0.5).any(axis))[0] for axis in (1, 0))
    if not len(rows):
        return SHAPES[0], 0.0, 0.5, 0.5
    padded = np.pad(covered, half + 2)
    best: tuple[float, int, int, int] = (np.inf, 0, 0, 0)
    for cy in {int(rows[0] + rows[-1]) // 2, int(rows[0] + rows[-1] + 1) // 2}:
        for cx in {int(columns[0] + columns[-1]) // 2, int(columns[0] + columns[-1] + 1) // 2}:
            y, x = cy + half + 2, cx + half + 2
            patch = padded[y - half : y + half + 1, x - half : x + half + 1].ravel()
            errors = templates[1] - 2.0 * (templates[0] @ patch)  # the patch's own square is the same for all
            i = int(errors.argmin())
            if errors[i] + patch @ patch < best[0]:
                best = (float(errors[i] + patch @ patch), i, cx, cy)
    _, i, cx, cy = best
    shape, radius = names[i]
    return shape, radius, (cx + offsets[i][0]) / size, (cy + offsets[i][1]) / size


@lru_cache(maxsize=4)
def _templates(size: int) -> tuple[tuple[Any, Any], list[tuple[str, float]], list[tuple[float, float]], int]:
    """Draw every shape at every radius and sub-pixel centre, cropped to (2 half + 1)^2 pixels."""
    half, middle = int(_RADII.max() * size) + 2, size // 2
    crop = slice(middle - half, middle + half + 1)
    shifts = (np.arange(_STEPS_PER_PIXEL) + 0.5) / _STEPS_PER_PIXEL
    drawn, names, offsets = [], [], []
    for shape in SHAPES:
        for radius in _RADII.tolist():
            for dx in shifts.tolist():
                for dy in shifts.tolist():
                    outline = Outline((middle + dx) / size, (middle + dy) / size, radius, (0, 0, 0))
                    drawn.append(coverage(shape, outline, size)[crop, crop].ravel())
                    names.append((shape, radius))
                    offsets.append((dx, dy))
    stack = np.stack(drawn).astype(np.float64)
    return (stack, (stack**2).sum(1)), names, offsets, half
