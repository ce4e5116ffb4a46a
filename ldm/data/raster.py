"""Bytes of images to pixels: what is accepted, and one geometry for all that lies on an image."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ldm.data import jpeg
from ldm.data.colour import is_srgb, to_srgb
from ldm.data.view import View

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats, as Pillow names them, that shards may hold."""
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of malformed EXIF
DECODER = 2
"""Version of the pixels; raise it when they change: statistics of images decoded otherwise are not taken."""
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what turns the image upright."""
_TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


def rgb(content: bytes, formats: tuple[str, ...] = FORMATS) -> Tensor:
    """Decode an image, wherever it lies: upright, sRGB, alpha over white, 16-bit grey scaled to 8 bits.

    Returns:
        (3, H, W) uint8, channels last in memory.

    Raises:
        ValueError: If it is no image of these formats; the message is the reason alone.
    """
    if "JPEG" in formats and plain_jpeg_size(content):
        with suppress(RuntimeError, ValueError):  # Pillow knows whether it can be read, and else why not
            return jpeg.pixels(content)
    return opened(io.BytesIO(content), lambda image: _rgb(image, content), formats)


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Read height and width of a JPEG that ``jpeg.pixels`` decodes as ``rgb`` does; None of all else."""
    return jpeg.plain_size(content, Image.MAX_IMAGE_PIXELS or 0)


def upright_size(path: Path, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Read height and width of an image file as ``rgb`` decodes it, from its header alone.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no image of these formats.
    """
    with path.open("rb") as file:
        return opened(file, _upright_size, formats)


def stored_size(content: bytes, is_whole: bool = True) -> tuple[int, int]:
    """Read height and width of an image as ``rgb`` decodes it, without its pixels.

    Args:
        content: The file or its beginning.
        is_whole: Whether it is the whole file.

    Raises:
        ValueError: If it is no image of the formats of shards, or its beginning does not tell.
    """
    if (size := plain_jpeg_size(content)) is not None:
        return size
    is_png = content.startswith(_PNG)
    if is_png and not is_whole:
        raise ValueError("a PNG may say behind its pixels how it is turned")
    if is_png and _ends_with_pixels(content):
        return opened(io.BytesIO(content), lambda image: _upright_size(image, Image.Image.getexif))
    return opened(io.BytesIO(content), _upright_size)


_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def _ends_with_pixels(png: bytes) -> bool:
    """Whether nothing stands behind the pixels: else Pillow decodes them to see it."""
    last = png.rfind(b"IDAT")
    return png[last + 8 + int.from_bytes(png[last - 4 : last]) :] == _PNG_END


def mask(content: bytes) -> Tensor:
    """Decode a mask: 1 where its grey value is 128 or more.

    Returns:
        (1, H, W) uint8, 0 or 1.

    Raises:
        ValueError: If it is no image.
    """
    return torch.from_numpy(opened(io.BytesIO(content), _grey) >= 128).to(torch.uint8)[None]


def classes(content: bytes) -> Tensor:
    """Decode a map of classes: the grey value, or the palette's index, is the class.

    Returns:
        (1, H, W) uint8.

    Raises:
        ValueError: If it is no image of one byte or bit per pixel.
    """
    return torch.from_numpy(opened(io.BytesIO(content), _indices))[None]


def shown(image: Tensor, view: View, mode: str = "bicubic", resize: bool = True) -> Tensor:
    """Crop an image as a view says, resize it and flip it.

    Args:
        image: (C, h, w) uint8 or uint16.
        view: What of it is shown.
        mode: "bicubic" for images, "nearest-exact" for what must not be mixed.
        resize: Whether it takes the size of the view; otherwise the crop keeps its own.

    Returns:
        (C, H, W) of the same type, channels first or last in memory, without gaps.
    """
    top, left, height, width = view.box(*image.shape[1:])
    if (height, width) != image.shape[1:]:
        image = image[:, top : top + height, left : left + width]
    size = (view.height, view.width)
    if resize and (height, width) != size:
        image = _resized(image, size, mode)
    image = image.flip(-1) if view.flip else image
    if image.is_contiguous() or (rows := image.permute(1, 2, 0)).is_contiguous():  # resized, or as decoded
        return image
    return rows.contiguous().permute(2, 0, 1)


def _resized(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if image.dtype == torch.uint16:  # torch interpolates no such integers, and float32 holds all of them
        found = F.interpolate(image[None].float(), size, mode=mode, antialias=mode == "bicubic")[0]
        return found.round_().clamp_(0, 65535).to(torch.uint16)
    # on uint8 with channels last, which [None] in front of (C, h, w) hides, this path of torch is several
    # times faster than Pillow's
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size, mode=mode, antialias=mode == "bicubic")[0]


def opened(file: IO[bytes], read: Callable[[Image.Image], T], formats: tuple[str, ...] = FORMATS) -> T:
    """Open an image and read something of it.

    Raises:
        ValueError: If it is no image of these formats, or cannot be read; the message is the reason alone.
    """
    try:
        with Image.open(file, formats=formats) as image:
            return read(image)
    except UnidentifiedImageError as error:
        length = file.seek(0, io.SEEK_END)
        raise ValueError(f"its {length} bytes are no JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow raises a dozen kinds for what it cannot make sense of
        reason = " ".join(f"{error or type(error).__name__}".split())
        raise ValueError(f"cannot be decoded as an image ({reason:.150})") from error


def _upright_size(image: Image.Image, exif: Callable[[Any], Image.Exif] | None = None) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if orientation(image, exif) in _TRANSPOSED else (height, width)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as the camera says."""
    image.load()
    method = _METHODS.get(orientation(image))
    return image if method is None else image.transpose(method)


def orientation(image: Image.Image, exif: Callable[[Any], Image.Exif] | None = None) -> int:
    """Read the camera's orientation: 1, upright, where it is malformed."""
    try:
        return int((exif or type(image).getexif)(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # cameras, scanners and editors write anything
        return 1


def _grey(image: Image.Image) -> np.ndarray:
    return np.array(upright(image).convert("L"))


def _indices(image: Image.Image) -> np.ndarray:
    if image.mode not in ("L", "P", "1"):
        raise ValueError(f"pixel mode {image.mode} holds no classes, expected 8-bit grey or a palette")
    return np.array(upright(image), dtype=np.uint8)


def _rgb(image: Image.Image, content: bytes) -> Tensor:
    profile = image.info.get("icc_profile")
    is_plain = image.format == "JPEG" and image.mode in ("L", "RGB") and orientation(image) == 1
    if is_plain and (profile is None or is_srgb(profile, image.mode)):
        with suppress(RuntimeError, ValueError):
            return jpeg.pixels(content)
    return torch.from_numpy(_converted(upright(image), profile)).permute(2, 0, 1)


def _converted(image: Image.Image, profile: bytes | None) -> np.ndarray:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} is not supported, expected 8 or 16 bits per channel")
    if profile:
        image = to_srgb(image, profile)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
