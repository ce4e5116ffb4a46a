"""Colours of a profile (ICC) to those of sRGB: phones write Display P3, scanners and printers their own."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_TOLERANCE = 2
"""Levels of 255 that a profile may be off sRGB and still be taken for it: the image then stays as it is."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image to sRGB; one whose profile is sRGB, broken or of another kind is returned itself."""
    mode = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    transform = _transform(profile, mode)
    if transform is None:
        return image
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA" if mode == "RGB" else "LA")
        alpha = image.getchannel("A")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def is_srgb(profile: bytes, mode: str) -> bool:
    """Whether ``to_srgb`` returns images of a mode with this profile themselves."""
    return _transform(profile, mode) is None


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Build what converts images of a mode to sRGB; None if nothing is to be or can be converted."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        probe = _colours(mode)
        converted = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16)
    except Exception:  # whatever a file may hold
        return None
    difference = np.abs(converted - np.asarray(probe.convert("RGB"))).max()
    return transform if difference > _TOLERANCE else None


def _colours(mode: str) -> Image.Image:
    """Draw all greys, or a lattice of 16 x 16 x 16 colours."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(16, -1, 3))
