"""ICC profiles made by hand: a matrix and a curve, as displays have them."""

from __future__ import annotations

import struct

import numpy as np

DISPLAY_P3 = [(0.515102, 0.241196, -0.001053), (0.291965, 0.692236, 0.041885), (0.157153, 0.066568, 0.784073)]
SRGB = [(0.436066, 0.222488, 0.013916), (0.385147, 0.716873, 0.097076), (0.143066, 0.060608, 0.714096)]
"""Columns for red, green and blue: XYZ under D50."""
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(columns: list[tuple[float, float, float]]) -> bytes:
    """A profile of RGB with sRGB's curve."""
    curve = b"para" + bytes(4) + struct.pack(">H2x", 3) + b"".join(map(_fixed, SRGB_CURVE))
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249))}
    tags |= {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {name + b"TRC": curve for name in (b"r", b"g", b"b")}
    tags |= {name: b"mluc" + bytes(4) + struct.pack(">II", 0, 12) for name in (b"desc", b"cprt")}
    return _packed(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey values with a curve of its own."""
    curve = b"para" + bytes(4) + struct.pack(">H2x", 0) + _fixed(gamma)
    return _packed(b"GRAY", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"kTRC": curve})


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Convert Display P3 (..., 3) uint8 to sRGB by the formula."""
    linear = pixels / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    linear = linear @ np.array(DISPLAY_P3) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255.0 * encoded)


def _packed(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = struct.pack(">I", offset + len(body))
    head = size + bytes(4) + bytes.fromhex("04300000") + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head += bytes(28) + _fixed(0.9642) + _fixed(1.0) + _fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
