"""Fields of a scene to condition on: mask, low-resolution image, map of classes, layout."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.masks import random_mask
from data.shapes.scene import COLOURS, SHAPES, Scene, box, coverage

NUM_MAP_CLASSES = 1 + len(COLOURS)
"""Classes of a map: 0 is the background, 1 + i the i-th of ``COLOURS``."""
NUM_LAYOUT_CLASSES = len(COLOURS) * len(SHAPES)
"""Classes of a layout: 6 i + j is the i-th of ``COLOURS`` in the j-th of ``SHAPES``."""
LOW_RES = 4
"""Side of the image per side of the one in low resolution."""


def label_map(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Return the colour of each pixel, (size, size): the object that covers half of it or more."""
    classes = np.zeros((size, size), np.uint8)
    for thing, outline in zip(scene.description.things, scene.outlines, strict=True):
        classes[coverage(thing.shape, outline, size) >= 0.5] = 1 + list(COLOURS).index(thing.colour)
    return classes


def layout(scene: Scene) -> list[dict[str, Any]]:
    """Return class and box of each object; boxes are left, top, right, bottom in [0, 1]."""
    return [
        {
            "label": list(COLOURS).index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape),
            "box": [min(1.0, max(0.0, edge)) for edge in box(thing.shape, outline, 1)],
        }
        for thing, outline in zip(scene.description.things, scene.outlines, strict=True)
    ]


def members(scene: Scene, image: NDArray[np.uint8], name: str) -> dict[str, bytes]:
    """Return the members of a sample that are images.

    Args:
        scene: What the image shows.
        image: The image, (H, H, 3).
        name: Decides the mask.
    """
    size = len(image)
    low = Image.fromarray(image).resize((size // LOW_RES, size // LOW_RES), Image.Resampling.BOX)
    return {
        "mask.png": _png(Image.fromarray(random_mask(name, size, size))),
        "low.png": _png(low),
        "map.png": _png(Image.fromarray(label_map(scene, size))),
    }


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()
