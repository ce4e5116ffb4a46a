"""JPEG straight from libjpeg-turbo to tensors: the pixels that Pillow gives, sooner."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DECODERS = ("simplejpeg", "torchvision")
"""Packages that decode, the faster one first; simplejpeg is optional. Their pixels are the same."""
INSTALLED = tuple(name for name in DECODERS if importlib.util.find_spec(name))
CHOSEN = os.environ.get("LDM_JPEG", *INSTALLED[:1])
"""Which of them does: the fastest that is installed, or the one that the environment names."""
if CHOSEN not in INSTALLED:
    raise ValueError(f"LDM_JPEG: got {CHOSEN}, expected one of {', '.join(DECODERS)} that is installed")


def plain_size(content: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Read height and width of a JPEG whose pixels nothing turns or colours, from its header.

    Args:
        content: Any bytes.
        max_pixels: Height x width, at most.

    Returns:
        None if it is anything but 8 bits of grey or colour without EXIF and profile.
    """
    place, size = len(_START), None
    if not content.startswith(_START):
        return None
    with suppress(IndexError, struct.error):  # it ends
        while content[place] == 0xFF:
            marker = content[place + 1]
            if marker in _FRAMES:
                bits, height, width, channels = _FRAME.unpack_from(content, place + 4)
                is_usual = bits == 8 and channels in (1, 3) and 0 < height * width <= max_pixels
                size = (height, width) if is_usual else None
            elif marker not in _TABLES:
                return size if marker == _SCAN else None
            place += 2 + (content[place + 2] << 8 | content[place + 3])
    return None


_START, _SCAN = b"\xff\xd8", 0xDA
_FRAMES, _FRAME = (0xC0, 0xC1, 0xC2), struct.Struct(">BHHB")
"""Baseline, extended and progressive frames: bits, height, width, channels (ITU-T T.81, B.2.2)."""
_TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xEE, 0xFE)
"""Segments that turn or colour nothing: tables, JFIF, Adobe's transform, comments."""


def pixels(content: bytes) -> Tensor:
    """Decode a JPEG of grey or RGB.

    Returns:
        (3, H, W) uint8, channels last in memory.

    Raises:
        RuntimeError: If it is damaged, or of another kind.
        ValueError: Likewise.
    """
    return _decoder()(content)


def decode_into(pixels: np.ndarray, content: bytes) -> None:
    """Decode a JPEG of grey or RGB, see ``pixels``, into (H, W, 3) uint8 of its size."""
    _decoder_into()(pixels, content)


@lru_cache(1)
def _decoder_into() -> Callable[[np.ndarray, bytes], object]:
    if CHOSEN == "simplejpeg":
        import simplejpeg

        return lambda pixels, content: simplejpeg.decode_jpeg(content, buffer=pixels)
    decode = _decoder()
    return lambda pixels, content: torch.from_numpy(pixels).copy_(decode(content).permute(1, 2, 0))


@lru_cache(1)
def _decoder() -> Callable[[bytes], Tensor]:
    """Import the decoder: here, for it takes longer than --help may."""
    if CHOSEN == "simplejpeg":
        import simplejpeg

        return lambda content: torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    from torchvision.io import ImageReadMode

    mode, operator = ImageReadMode.RGB.value, getattr(torch.ops.image, "decode_jpeg", None)

    def decode(content: bytes) -> Tensor:
        if operator is None:  # torchvision 0.29 announces that it will go
            raise RuntimeError("this torchvision decodes no JPEG")
        # not its function, which warns of that and takes 20 us more
        found: Tensor = operator(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode, False)
        return found

    return decode
