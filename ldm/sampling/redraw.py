"""The image that a call of ldm.sample redraws, or a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from ldm.data.buckets import Size
from ldm.io.images import from_bytes
from ldm.sampling.draw import Redraw
from ldm.sampling.requests import read_files
from ldm.types import RGB8, ImageKind

STRENGTH = 0.75
"""Default of --strength."""


def redraw(options: Namespace, reads: Sequence[str], size: Size, kind: ImageKind = RGB8) -> Redraw | None:
    """Read the image to start from; None if there is none, or if the model is conditioned on it.

    Raises:
        ValueError: If --mask or --strength have no image.
    """
    if "image" in reads:
        if options.strength is not None:
            raise ValueError("--strength: the model is conditioned on --image, it redraws no image")
        return None
    if options.image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: there is no image to redraw, expected --image")
        return None
    strength = options.strength if options.strength is not None else 1.0 if options.mask else STRENGTH
    files = {field: getattr(options, field) for field in ("image", "mask")}
    sample: dict[str, Any] = dict(
        read_files({k: path for k, path in files.items() if path is not None}, size, kind)
    )
    mask = sample.get("mask")
    return Redraw(from_bytes(sample["image"]), strength, None if mask is None else mask.float())
