"""Agreement of images of shapes with their masks, maps and layouts."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from data.shapes.reader import Found, read
from data.shapes.scene import BACKGROUNDS, COLOURS, SHAPES
from ldm.io.images import to_bytes
from ldm.metrics.metric import MeansMetric
from ldm.types import Batch

LAYOUT_FIELDS = ("count", "class", "position", "all")
TOLERANCE = 0.05
"""Largest distance of an object from the middle of its box, as a fraction of the side."""


class KnownPSNR(MeansMetric):
    """PSNR in dB where an inpainted image was known (``batch["mask"]`` is 0), against ``batch["image"]``."""

    def __init__(self) -> None:
        super().__init__(["known/psnr"], higher_is_better=True)

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        known = 1.0 - batch["mask"].expand_as(images)
        squares = ((images - batch["image"]) ** 2 * known).flatten(1).sum(1)
        error = squares / known.flatten(1).sum(1)
        self.add("known/psnr", 10.0 * torch.log10(4.0 / error.clamp(min=1e-10)))


class MapAgreement(MeansMetric):
    """Fraction of pixels whose nearest named colour is the one of ``batch["label_map"]``.

    ``map/all`` is over all pixels, ``map/objects`` over those of objects. Real images reach less than 1: on
    edges colours are mixed.
    """

    def __init__(self) -> None:
        super().__init__(["map/all", "map/objects"], higher_is_better=True)

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        wanted = batch["label_map"].cpu()
        right = (nearest_classes(to_bytes(images).cpu()) == wanted).flatten(1).double()
        objects = (wanted > 0).flatten(1).double()
        self.add("map/all", right.mean(1))
        self.add("map/objects", (right * objects).sum(1) / objects.sum(1).clamp(min=1.0))


class LayoutAccuracy(MeansMetric):
    """Fraction of images that agree with ``batch["layout"]``: count, class, position, and all of them."""

    def __init__(self) -> None:
        super().__init__([f"layout/{field}" for field in LAYOUT_FIELDS], higher_is_better=True)

    @override
    def update(self, images: Tensor, batch: Batch) -> None:
        pixels = to_bytes(images).permute(0, 2, 3, 1).cpu().numpy()
        rows = [
            _compare(read(image).found, boxes.cpu().numpy())
            for image, boxes in zip(pixels, batch["layout"], strict=True)
        ]
        for name, field in zip(self.names, LAYOUT_FIELDS, strict=True):
            self.add(name, Tensor([row[field] for row in rows]))


def nearest_classes(images: Tensor) -> Tensor:
    """Name the colour of pixels (B, 3, H, W) uint8 as maps do, (B, H, W) int64: 0 is any background."""
    palette = torch.tensor([*BACKGROUNDS.values(), *COLOURS.values()])
    away = (images[:, None].long() - palette[:, :, None, None]).square().sum(2)
    return (away.argmin(1) - (len(BACKGROUNDS) - 1)).clamp(min=0)


def _compare(found: tuple[Found, ...], boxes: NDArray[np.float32]) -> dict[str, bool]:
    if len(found) != len(boxes):
        return dict.fromkeys(LAYOUT_FIELDS, False)
    best = {"class": False, "position": False}
    for order in permutations(found):
        pairs = list(zip(order, boxes.tolist(), strict=True))
        result = {
            "class": all(_class(thing) == int(box[0]) for thing, box in pairs),
            "position": all(_lies_in(thing, box) for thing, box in pairs),
        }
        best = max(best, result, key=lambda one: (one["class"], one["position"]))  # the class decides first
    return {"count": True, **best, "all": all(best.values())}


def _class(found: Found) -> int:
    return list(COLOURS).index(found.thing.colour) * len(SHAPES) + SHAPES.index(found.thing.shape)


def _lies_in(found: Found, box: list[float]) -> bool:
    _, left, top, right, bottom = box
    return max(abs(found.x - (left + right) / 2), abs(found.y - (top + bottom) / 2)) <= TOLERANCE
