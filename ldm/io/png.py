"""PNGs of 8 and of 16 bits per channel: Pillow writes the latter of grey alone."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels to the colour type: grey, grey and alpha, RGB, RGB and alpha (PNG, 3rd edition, table 8)."""
_UP = 2
"""Filter of a row: differences to the row above (9.2)."""


def encode_png(pixels: np.ndarray, info: PngInfo | None = None) -> bytes:
    """Encode an image.

    Args:
        pixels: (H, W, C) uint8 or uint16, C = 1, 3 or 4; RGB and alpha, or another fourth channel.
        info: Text of the file.
    """
    if pixels.dtype == np.uint16:
        return png_of_16_bits(pixels, info or PngInfo())
    out = io.BytesIO()
    single = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(single).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def png_of_16_bits(pixels: np.ndarray, info: PngInfo) -> bytes:
    """Encode an image of 16 bits.

    Args:
        pixels: (H, W, C) uint16, C from 1 to 4.
        info: Text of the file.
    """
    height, width, channels = pixels.shape
    out = io.BytesIO()
    out.write(b"\x89PNG\r\n\x1a\n")
    putchunk(out, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0))
    for name, content, *_ in info.chunks:
        putchunk(out, name, content)
    rows = np.ascontiguousarray(pixels, ">u2").reshape(height, -1).view(np.uint8)
    differences = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # modulo 256
    lines = np.insert(differences, 0, _UP, axis=1)
    putchunk(out, b"IDAT", zlib.compress(lines.tobytes()))
    putchunk(out, b"IEND", b"")
    return out.getvalue()
