"""Captioned shapes: a data set made by a program, which packs itself into tar shards.

A scene is one or two coloured shapes on a plain background. An image of it can be read back
exactly (``data.shapes.reader``), so how well a model follows a caption is a number.
All lengths are fractions of the canvas, x to the right and y downward from the top left corner.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BACKGROUNDS = {"white": (248, 248, 248), "grey": (128, 128, 128), "black": (12, 12, 12)}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (250, 145, 20),
    "yellow": (245, 225, 30),
    "green": (30, 160, 55),
    "cyan": (35, 205, 225),
    "blue": (35, 65, 220),
    "purple": (125, 40, 180),
    "pink": (250, 130, 195),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 0.14, "large": 0.21}
POSITIONS = {
    "in the center": (0.5, 0.5),
    "in the top left": (0.26, 0.26),
    "in the top right": (0.74, 0.26),
    "in the bottom left": (0.26, 0.74),
    "in the bottom right": (0.74, 0.74),
}
RELATIONS = {"left of": (0.25, 0.0), "above": (0.0, 0.25)}
"""Canonical relations: from the centre of the canvas to the second object; the first lies opposite."""
MIRRORED = {"left of": "right of", "above": "below"}
_HELD_OUT_SHAPES = ("triangle", "ring", "square", "circle", "cross", "diamond", "square", "circle")
HELD_OUT_PAIRS = frozenset(zip(COLOURS, _HELD_OUT_SHAPES, strict=True))
SPLITS = ("train", "val", "novel", "pairs")

_COLOUR_JITTER = 8  # levels
_SIZE_JITTER = 0.05  # of the radius
_POSITION_JITTER = 0.025
_ALONG_JITTER, _ACROSS_JITTER = 0.02, 0.09  # of a pair, along and across its axis
_SUPERSAMPLING = 4

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object in a caption."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Description:
    """Content of a caption.

    Args:
        things: One object, or two in canonical order: the left or the upper one first.
        where: A key of ``POSITIONS`` for one object, of ``RELATIONS`` for two.
        background: A key of ``BACKGROUNDS``; None if the caption does not name it.
    """

    things: tuple[Thing, ...]
    where: str
    background: str | None = None

    def caption(self, mirrored: bool = False, background: bool = True) -> str:
        """Write the caption; the canonical one names the background and "left of" or "above"."""
        first, last = self.things[0], self.things[-1]
        if len(self.things) == 1:
            text = f"a {first} {self.where}"
        elif mirrored:
            text = f"a {last} {MIRRORED[self.where]} a {first}"
        else:
            text = f"a {first} {self.where} a {last}"
        return f"{text} on a {self.background} background" if background and self.background else text


@dataclass(frozen=True)
class Outline:
    """Geometry of a drawn object: centre and half width as fractions of the canvas, colour 0-255."""

    x: float
    y: float
    radius: float
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """A description with its drawing: ``outlines[i]`` draws ``description.things[i]``."""

    description: Description
    background_rgb: RGB
    outlines: tuple[Outline, ...]


def canonical_caption(scene: Scene) -> str:
    """Return the caption that names a scene: all evaluation sets use it."""
    return scene.description.caption()


def training_captions(scene: Scene) -> list[str]:
    """Return every wording that training may use, the canonical one first."""
    mirrors = (False, True) if len(scene.outlines) == 2 else (False,)
    return [scene.description.caption(mirrored, named) for mirrored in mirrors for named in (True, False)]


def is_novel(scene: Scene) -> bool:
    """Whether a scene is held out from training, a tenth of all: first byte of its caption's SHA-256 < 26."""
    return hashlib.sha256(canonical_caption(scene).encode()).digest()[0] < 26


def is_held_out_pair(scene: Scene) -> bool:
    """Whether an object has a combination of colour and shape that is held out from training."""
    return any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.description.things)


def belongs_to(scene: Scene, split: str) -> bool:
    """Whether a split may hold the scene; train and val hold neither novel scenes nor held-out pairs."""
    wanted = {"train": (False, False), "val": (False, False), "novel": (True, False), "pairs": (False, True)}
    return (is_novel(scene), is_held_out_pair(scene)) == wanted[split]


def sample_scene(seed: int, index: int, split: str | None = None) -> Scene:
    """Draw a scene as a pure function of its arguments.

    Args:
        seed: Seed of the data set.
        index: Number of the scene, from 0.
        split: One of ``SPLITS`` draws until the scene belongs to it; None takes any scene.

    Raises:
        ValueError: If ``split`` is unknown.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"sample_scene: split is '{split}', expected one of {', '.join(SPLITS)}")
    rng = _generator(seed, split, index, "scene")
    while True:
        scene = _draw_scene(rng)
        if split is None or belongs_to(scene, split):
            return scene


def sample_wording(scene: Scene, seed: int, index: int) -> str:
    """Draw a training caption: half of the pairs mirrored, 30 % without the background."""
    rng = _generator(seed, index, "wording")
    mirrored, named = rng.random() < 0.5, rng.random() >= 0.3
    return scene.description.caption(mirrored, named)


def sample_scenes(seed: int, split: str, count: int) -> list[Scene]:
    """Draw the scenes of a split; in novel and pairs no caption repeats until all are used."""
    if split in ("train", "val"):
        return [sample_scene(seed, index, split) for index in range(count)]
    distinct = _distinct(seed, split)
    return [next(distinct) for _ in range(count)]


def _distinct(seed: int, split: str, patience: int = 5000) -> Iterator[Scene]:
    index, misses, seen = 0, 0, set[str]()
    while True:
        scene = sample_scene(seed, index, split)
        index, misses = index + 1, misses + 1
        if misses > patience:  # every scene of the split is used up: begin a second round
            seen.clear()
        if canonical_caption(scene) not in seen:
            seen.add(canonical_caption(scene))
            misses = 0
            yield scene


def _generator(*name: object) -> random.Random:
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def _draw_scene(rng: random.Random) -> Scene:
    # Of Python's generator only random() is promised to give the same numbers in every version.
    num_things = 2 if rng.random() < 0.7 else 1
    things = tuple(
        Thing(_choose(rng, tuple(SIZES)), _choose(rng, tuple(COLOURS)), _choose(rng, SHAPES))
        for _ in range(num_things)
    )
    where = _choose(rng, tuple(RELATIONS if num_things == 2 else POSITIONS))
    background = _choose(rng, tuple(BACKGROUNDS))
    outlines = tuple(
        Outline(x, y, SIZES[thing.size] * (1 + _spread(rng, _SIZE_JITTER)), _tint(rng, COLOURS[thing.colour]))
        for thing, (x, y) in zip(things, _centres(rng, where), strict=True)
    )
    return Scene(Description(things, where, background), _tint(rng, BACKGROUNDS[background]), outlines)


def _centres(rng: random.Random, where: str) -> list[tuple[float, float]]:
    if where in POSITIONS:
        x, y = POSITIONS[where]
        return [(x + _spread(rng, _POSITION_JITTER), y + _spread(rng, _POSITION_JITTER))]
    centres = []
    for side in (-1, 1):
        along = 0.5 + side * 0.25 + _spread(rng, _ALONG_JITTER)
        across = 0.5 + _spread(rng, _ACROSS_JITTER)
        centres.append((along, across) if where == "left of" else (across, along))
    return centres


def _choose(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def _spread(rng: random.Random, half_width: float) -> float:
    return (2 * rng.random() - 1) * half_width


def _tint(rng: random.Random, rgb: RGB) -> RGB:
    levels = 2 * _COLOUR_JITTER + 1
    red, green, blue = (
        min(255, max(0, level + int(rng.random() * levels) - _COLOUR_JITTER)) for level in rgb
    )
    return red, green, blue


def inside(shape: str, dx: NDArray[Any], dy: NDArray[Any], radius: Any) -> NDArray[np.bool_]:
    """Return which points lie in a shape, from their offsets to its centre; all arguments broadcast.

    Raises:
        ValueError: If the shape is unknown.
    """
    x, y = abs(dx), abs(dy)
    if shape == "circle":
        return np.asarray(dx**2 + dy**2 <= radius**2)
    if shape == "square":
        return np.asarray(np.maximum(x, y) <= 0.9 * radius)
    if shape == "triangle":
        return np.asarray((2 * x <= dy + radius) & (y <= radius))
    if shape == "diamond":
        return np.asarray(x + y <= radius)
    if shape == "cross":
        return np.asarray((np.minimum(x, y) <= 0.36 * radius) & (np.maximum(x, y) <= radius))
    if shape == "ring":
        squared = dx**2 + dy**2
        return np.asarray((squared <= radius**2) & (squared >= (0.52 * radius) ** 2))
    raise ValueError(f"inside: shape is '{shape}', expected one of {', '.join(SHAPES)}")


def coverage(shape: str, outline: Outline, size: int) -> NDArray[np.float32]:
    """Return how much of each pixel an object covers: (size, size) float32 in [0, 1]."""
    fine = size * _SUPERSAMPLING
    points = ((np.arange(fine) + 0.5) / fine).astype(np.float32)
    columns, rows = _span(outline.x, outline.radius, size), _span(outline.y, outline.radius, size)
    dx = points[columns.start * _SUPERSAMPLING : columns.stop * _SUPERSAMPLING] - outline.x
    dy = points[rows.start * _SUPERSAMPLING : rows.stop * _SUPERSAMPLING] - outline.y
    mask = inside(shape, dx[None, :], dy[:, None], outline.radius)
    blocks = mask.reshape(
        len(dy) // _SUPERSAMPLING, _SUPERSAMPLING, len(dx) // _SUPERSAMPLING, _SUPERSAMPLING
    )
    covered = np.zeros((size, size), np.float32)
    covered[rows, columns] = blocks.mean((1, 3), dtype=np.float32)
    return covered


def _span(centre: float, radius: float, size: int) -> slice:
    return slice(max(0, int((centre - radius) * size)), min(size, int((centre + radius) * size) + 1))


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Draw a scene with 4x4 supersampled edges: (size, size, 3) uint8."""
    image = np.broadcast_to(np.asarray(scene.background_rgb, np.float32), (size, size, 3))
    for thing, outline in zip(scene.description.things, scene.outlines, strict=True):
        covered = coverage(thing.shape, outline, size)[..., None]
        image = image + covered * (np.asarray(outline.rgb, np.float32) - image)
    return np.asarray(np.rint(image), np.uint8)


def box(shape: str, outline: Outline, size: int) -> tuple[float, float, float, float]:
    """Return the bounding box of an object in pixels: left, top, right, bottom."""
    half = outline.radius * (0.9 if shape == "square" else 1.0)
    edges = (outline.x - half, outline.y - half, outline.x + half, outline.y + half)
    left, top, right, bottom = (round(edge * size, 3) for edge in edges)
    return left, top, right, bottom
