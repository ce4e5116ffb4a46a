"""JPEG straight from libjpeg-turbo to tensors: the pixels that Pillow gives, sooner."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

DECODERS = ("torchvision", "simplejpeg")
CHOSEN = os.environ.get("LDM_JPEG", DECODERS[0])
"""Which of them decodes. The second is an optional package, a fifth faster, with the same pixels."""
if CHOSEN not in DECODERS or importlib.util.find_spec(CHOSEN) is None:
    raise ValueError(f"LDM_JPEG: got {CHOSEN}, expected one of {', '.join(DECODERS)} that is installed")


def is_plain(content: bytes, max_pixels: int) -> bool:
    """Whether nothing turns or colours the pixels of a JPEG: 8 bits of grey or colour, no EXIF, no profile.

    Args:
        content: Any bytes.
        max_pixels: Height x width up to which it is.
    """
    place, is_usual = 2, False
    while content[place : place + 1] == b"\xff" and len(content) >= place + 10:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if marker in _FRAMES:
            bits, height, width, channels = _FRAME.unpack_from(content, place + 4)
            is_usual = bits == 8 and channels in (1, 3) and 0 < height * width <= max_pixels
        elif marker not in _TABLES:
            return is_usual and marker == _SCAN
        place += 2 + length
    return False


_SCAN = 0xDA
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
