"""Bytes of pictures to pixels: what is accepted, and one geometry for all that lies on a picture."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def rgb(content: bytes) -> Tensor:
    """Decode a picture: upright, alpha over white, 16-bit grey scaled to 8 bits.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: If it is no JPEG, PNG or WebP picture; the message is the reason alone.
    """
    return torch.from_numpy(_opened(content, _rgb)).permute(2, 0, 1)


def mask(content: bytes) -> Tensor:
    """Decode a mask: 1 where its grey value is 128 or more.

    Returns:
        (1, H, W) uint8, 0 or 1.

    Raises:
        ValueError: If it is no picture.
    """
    return torch.from_numpy(_opened(content, _grey) >= 128).to(torch.uint8)[None]


def classes(content: bytes) -> Tensor:
    """Decode a map of classes: the grey value, or the palette's index, is the class.

    Returns:
        (1, H, W) uint8.

    Raises:
        ValueError: If it is no picture of one byte or bit per pixel.
    """
    return torch.from_numpy(_opened(content, _indices))[None]


def square(image: Tensor, size: int | None, mode: str = "bicubic") -> Tensor:
    """Crop the central square and resize it.

    Args:
        image: (C, H, W) uint8.
        size: Side of the result; None takes the square as large as it is.
        mode: "bicubic" for pictures, "nearest-exact" for what must not be mixed.

    Returns:
        (C, size, size) uint8.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    if height != width:
        top, left = corner(height, width)
        image = image[:, top : top + side, left : left + side]
    if size is not None and side != size:
        # on uint8 with channels last this path of torch is several times faster than Pillow's
        image = F.interpolate(image[None], (size, size), mode=mode, antialias=mode == "bicubic")[0]
    return image.contiguous()


def corner(height: int, width: int) -> tuple[int, int]:
    """Return top and left of the central square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2


def _opened(content: bytes, read: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as picture:
            return read(picture)
    except UnidentifiedImageError as error:
        raise ValueError(f"its {len(content)} bytes are no JPEG, PNG or WebP picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"cannot be decoded as a picture ({reason})") from error


def _grey(picture: Image.Image) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(picture).convert("L"))


def _indices(picture: Image.Image) -> np.ndarray:
    if picture.mode not in ("L", "P", "1"):
        raise ValueError(f"pixel mode {picture.mode} holds no classes, expected 8-bit grey or a palette")
    return np.array(ImageOps.exif_transpose(picture), dtype=np.uint8)


def _rgb(picture: Image.Image) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 or 16 bits per channel")
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture.convert("RGBA"))
        picture = canvas
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
