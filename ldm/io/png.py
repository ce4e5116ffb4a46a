"""PNG of 16 bits per channel, which Pillow writes of grey alone."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL.PngImagePlugin import PngInfo, putchunk

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels to the colour type: grey, grey and alpha, RGB, RGB and alpha (PNG, 3rd edition, table 8)."""
_UP = 2
"""Filter of a row: differences to the row above (9.2)."""


def png_of_16_bits(pixels: np.ndarray, info: PngInfo) -> bytes:
    """Encode an image.

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
