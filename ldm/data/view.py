"""What of an image a sample shows: one geometry for all that lies on it, and how training draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ldm.data.order import mix
from ldm.types import RGB8, ImageKind


@dataclass(frozen=True)
class View:
    """Size, crop, flip and kind of an image and of what lies on it, and the bits that choose among captions.

    Args:
        height: H of the image once it is cropped and resized, in pixels.
        width: W of it.
        flip: Whether left and right are exchanged, after the crop.
        crop: Where the crop lies in the image, down and across, in [0, 1): 0 is top or left, almost 1 bottom
            or right; None is the centre.
        draw: 63 random bits that choose among several captions (training); None takes the canonical caption
            (evaluation).
        captions: Keys in json, or "txt": the first that a sample has gives its caption. If it has none of
            them, the caption is the one without them.
        kind: Channels and bits of the image.
    """

    height: int
    width: int
    flip: bool = False
    crop: tuple[float, float] | None = None
    draw: int | None = None
    captions: tuple[str, ...] = ()
    kind: ImageKind = RGB8

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the crop of an image of ``height`` x ``width`` pixels.

        The crop is the largest one with the proportions of the view, rounded to full pixels.
        """
        if height * self.width >= width * self.height:
            high, wide = min(height, max(1, round(width * self.height / self.width))), width
        else:
            high, wide = height, min(width, max(1, round(height * self.width / self.height)))
        if self.crop is None:
            return (height - high) // 2, (width - wide) // 2, high, wide
        down, across = self.crop
        return int((height - high + 1) * down), int((width - wide + 1) * across), high, wide


@dataclass(frozen=True)
class Augment:
    """What is drawn anew whenever training reads a sample, by (seed, position); validation stays as it is.

    Args:
        flip: Probability that left and right are exchanged, in the image and in what lies on it; 0 never. No
            caption is changed: leave it at 0 where some tell left from right. Latents need ldm.encode --flip.
        crop: Where the part of an image that is not square lies: "center", or "random". Latents have none.
        captions: Keys in a sample's json, or "txt", with the weights by which its caption is drawn among
            those that it has, e.g. {caption: 0.7, caption_short: 0.3}. None draws of the list "captions".
    """

    flip: float = 0.0
    crop: Literal["center", "random"] = "center"
    captions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.augment.flip: got {self.flip}, expected a probability, 0 to 1")
        weights = {} if self.captions is None else dict(self.captions)
        if self.captions is not None and not (weights and all(0 < w < math.inf for w in weights.values())):
            raise ValueError(f"data.augment.captions: got {weights}, expected keys with weights above 0")

    def view(self, height: int, width: int, draw: int) -> View:
        """Return a sample's view of ``height`` x ``width`` pixels: a function of its 63 random bits."""
        return View(
            height,
            width,
            flip=self.flip > 0 and _uniform(draw, 1) < self.flip,
            crop=(_uniform(draw, 2), _uniform(draw, 3)) if self.crop == "random" else None,
            draw=draw,
            captions=self._ranked(draw),
        )

    def _ranked(self, draw: int) -> tuple[str, ...]:
        """Rank the keys of captions: whichever of them a sample has, each comes first by its weight.

        Of independent exponential times with these rates, key k's is the first with probability w_k / sum w.
        """
        if not self.captions:
            return ()
        times = {
            key: -math.log1p(-_uniform(draw, 4, *key.encode())) / weight
            for key, weight in self.captions.items()
        }
        return tuple(sorted(times, key=lambda key: times[key]))


NO_AUGMENT = Augment()
"""The central crop, never flipped, and captions as ever."""


def _uniform(*values: int) -> float:
    """Hash integers to a number in [0, 1)."""
    return (mix(*values) >> 11) / (1 << 53)
