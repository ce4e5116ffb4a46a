"""Images of the declared kind: 1, 3 or 4 channels of 8 or 16 bits, without a silent loss."""

from __future__ import annotations

import io
import sys

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ldm.data import raster
from ldm.data.colour import to_srgb
from ldm.types import ImageKind

Pixels = np.ndarray
"""(H, W, C) uint8 or uint16; C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha)."""
_TO_16 = 257
"""Factor from 8 to 16 bits: 255 becomes 65535."""
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes without colours."""
_PNG = b"\x89PNG\r\n\x1a\n"
_ANY = "data.image.convert any"


class OtherKind(ValueError):
    """An image of another kind than the declared one, which cannot be converted without a loss."""


def decoded(content: bytes, kind: ImageKind, formats: tuple[str, ...] = raster.FORMATS) -> Tensor:
    """Decode an image, upright, and convert it to its kind, see ``ImageKind``.

    8-bit colours become sRGB, as in ``raster.rgb``, which decodes the default kind. Grey values and 16 bits
    may be measurements: they are taken as the file has them, whatever its profile.

    Returns:
        (C, H, W) uint8 or uint16, channels last in memory.

    Raises:
        OtherKind: If something would be lost or made up that the kind does not allow.
        ValueError: If it is no image of these formats; the message is the reason alone.
    """
    if not kind.is_exact and (kind.channels, kind.bits) == (3, 8):
        return raster.rgb(content, formats=formats)
    pixels = np.ascontiguousarray(converted(stored(content, formats), kind))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stored(content: bytes, formats: tuple[str, ...] = raster.FORMATS) -> Pixels:
    """Decode an image with the channels and bits that its file has, upright.

    Raises:
        ValueError: If it is no image of these formats; the message is the reason alone.
    """
    return raster.opened(io.BytesIO(content), lambda image: _stored(image, content), formats)


def _stored(image: Image.Image, content: bytes) -> Pixels:
    """Read the pixels of an image as its file has them, but for profiles of 8-bit colours."""
    if content.startswith(_PNG) and image.mode != "I;16" and content[24] == 16:
        return _turned(_png_of_16_bits(image, content), raster.orientation(image))
    if isinstance(image, TiffImageFile):
        return _tiff(image, content)
    return _of_pillow(image)


def _of_pillow(image: Image.Image) -> Pixels:
    profile, image = image.info.get("icc_profile"), raster.upright(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None]
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} is not supported, expected 8 or 16 bits per channel")
    is_grey = image.mode in GREY
    if profile and not is_grey:
        image = to_srgb(image, profile)
    mode = ("L" if is_grey else "RGB") + ("A" if image.has_transparency_data else "")
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _png_of_16_bits(image: Image.Image, content: bytes) -> Pixels:
    """Decode a PNG of 16 bits, of which Pillow gives 8, but for grey alone: the high ones, and then the low.

    torchvision's decoder would give all, but some damaged files end its process.
    """
    if "transparency" in image.info:
        raise ValueError("a PNG of 16 bits with a transparent colour is not supported, expected alpha")
    raw = _RAW[content[25]]
    parts = [_unpacked(content, each) for each in raw]
    if len(parts) == 1:
        return parts[0].view(">u2").astype(np.uint16)
    return (parts[0].astype(np.uint16) << 8) | parts[1]


_RAW = {2: ("RGB;16B", "RGB;16L"), 4: ("RGBA",), 6: ("RGBA;16B", "RGBA;16L")}
"""Colour type to what Pillow may take its rows for: all bytes, or the first and the second of each two."""


def _unpacked(content: bytes, raw: str) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.tile = [image.tile[0]._replace(args=raw)]
        return np.array(image)


def _tiff(image: TiffImageFile, content: bytes) -> Pixels:
    """Decode a TIFF: all of it, or nothing. Pillow reads 8 bits of 16, but for grey, and skips channels."""
    frames, found, samples = getattr(image, "n_frames", 1), len(image.getbands()), image.tag_v2.get(277, 1)
    if frames > 1 or samples not in (found, 1):
        raise ValueError(
            f"a TIFF of {frames} images of {samples} channels is not read, expected one of 1 to 4"
        )
    if image.mode not in ("RGB", "RGBA") or max(image.tag_v2.get(258, (8,))) != 16:
        is_inverted = image.mode == "I;16" and image.tag_v2.get(262) == 0  # Pillow inverts 8 bits alone
        return 65535 - _of_pillow(image) if is_inverted else _of_pillow(image)
    if image.tag_v2.get(284, 1) != 1:
        raise ValueError("a TIFF of 16 bits with a plane for each channel is not supported")
    # libtiff gives numbers as this machine has them, and Pillow itself as the file does
    is_little = sys.byteorder == "little" if image.tile[0].codec_name == "libtiff" else content[:2] == b"II"
    low, high = ("B", "L") if is_little else ("L", "B")
    first, second = (_unpacked_tiff(content, f"{image.mode};16{order}") for order in (low, high))
    return _turned((second.astype(np.uint16) << 8) | first, raster.orientation(image))


def _unpacked_tiff(content: bytes, raw: str) -> np.ndarray:
    with Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
        image.tile = [tile._replace(args=(raw, *tuple(tile.args or ())[1:])) for tile in image.tile]
        image.getexif().pop(ExifTags.Base.Orientation, None)
        return np.array(image)


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Turn pixels upright by the EXIF orientation: exchange rows and columns, then reverse either."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


def converted(pixels: Pixels, kind: ImageKind) -> np.ndarray:
    """Convert pixels to a kind.

    Returns:
        (H, W, C) uint8 or uint16 with the channels of the kind.

    Raises:
        OtherKind: If something would be lost or made up that the kind does not allow.
    """
    colours, alpha = (pixels[..., :-1], pixels[..., -1:]) if pixels.shape[2] in (2, 4) else (pixels, None)
    if kind.channels == 4:
        alpha = _opaque(colours, kind) if alpha is None else alpha
        return _in_bits(np.concatenate([_rgb(colours), alpha], axis=2), kind)
    if alpha is not None and (alpha != _highest(pixels)).any():
        colours = _over_white(colours, alpha, kind)
    return _in_bits(_grey(colours, kind) if kind.channels == 1 else _rgb(colours), kind)


def _highest(pixels: Pixels) -> int:
    return int(np.iinfo(pixels.dtype).max)


def _opaque(colours: Pixels, kind: ImageKind) -> Pixels:
    if kind.is_exact:
        raise OtherKind(f"has no fourth channel, expected {kind} (data.image); {_ANY} adds an opaque one")
    return np.full_like(colours[..., :1], _highest(colours))


def _over_white(colours: Pixels, alpha: Pixels, kind: ImageKind) -> Pixels:
    if kind.is_exact:
        raise OtherKind(f"has alpha, expected {kind} (data.image); {_ANY} lays it over white")
    white, a = _highest(colours), alpha.astype(np.uint64)
    mixed = (colours * a + white * (white - a) + white // 2) // white
    return mixed.astype(colours.dtype)


def _rgb(colours: Pixels) -> Pixels:
    return colours.repeat(3, axis=2) if colours.shape[2] == 1 else colours


def _grey(colours: Pixels, kind: ImageKind) -> Pixels:
    """Take the first of equal channels, else the luma of ITU-R 601, as Pillow does."""
    if colours.shape[2] == 1 or (colours[..., :1] == colours[..., 1:]).all():
        return colours[..., :1]
    if kind.is_exact:
        raise OtherKind(f"has colours, expected {kind} (data.image); {_ANY} takes their luma")
    luma = (colours @ np.array([19595, 38470, 7471], np.uint64) + 0x8000) >> np.uint64(16)
    return luma.astype(colours.dtype)[..., None]


def _in_bits(pixels: Pixels, kind: ImageKind) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels if kind.bits == 8 else pixels.astype(np.uint16) * np.uint16(_TO_16)
    if kind.bits == 16:
        return pixels
    if kind.is_exact and (pixels % _TO_16).any():
        raise OtherKind(f"has 16 bits, expected {kind} (data.image); {_ANY} rounds to 8")
    return ((pixels.astype(np.uint32) + _TO_16 // 2) // _TO_16).astype(np.uint8)
