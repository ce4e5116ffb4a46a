"""Images as files: rounding to integers, grids, and PNGs that say how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.io.atomic import replacing
from ldm.io.png import encode_png

GAP = 2
"""Pixels between the images of a grid."""


LEVELS = {8: torch.uint8, 16: torch.uint16}
"""Bits of a channel to the type of its integers."""


def to_levels(image: Tensor, bits: int) -> Tensor:
    """Round images (..., C, H, W) in [-1, 1] to uint8 or uint16, by the bits; values outside are clamped."""
    return ((image.float().clamp(-1.0, 1.0) + 1.0) * ((2**bits - 1) / 2)).round().to(LEVELS[bits])


def to_bytes(image: Tensor) -> Tensor:
    """Round images (..., C, H, W) in [-1, 1] to uint8 in [0, 255]; values outside are clamped."""
    return to_levels(image, 8)


def check_finite(images: Tensor, keys: Sequence[str]) -> None:
    """Check images (B, ...) before they are rounded: NaN would become black without a word.

    Raises:
        ValueError: If one is not finite; it names the first by its key.
    """
    # NaN and infinity stay in a sum, which is 20 times as fast on a CPU as a look at each number
    is_bad = ~images.flatten(1).sum(1, dtype=torch.float32).isfinite()
    if num := int(is_bad.sum()):
        key = keys[int(is_bad.nonzero()[0])]
        raise ValueError(
            f"{num} of {len(images)} images are not finite, the first is that of '{key}': "
            "the weights are damaged, or numbers overflowed: try a wider precision, or less guidance"
        )


def from_bytes(image: Tensor) -> Tensor:
    """Map images (..., C, H, W) of uint8 or uint16 to float32 in [-1, 1]; inverts ``to_levels``."""
    return image.float() / (32767.5 if image.dtype == torch.uint16 else 127.5) - 1.0


def rounded(image: Tensor, bits: int) -> Tensor:
    """Round images in [-1, 1] to what a file of so many bits would give back."""
    return from_bytes(to_levels(image, bits))


def displayed(images: Tensor) -> Tensor:
    """Make of images what a screen shows: grey as RGB, the first three of more channels, 8 bits.

    Args:
        images: (N, C, H, W), uint8, uint16 or float in [-1, 1].

    Returns:
        (N, 3, H, W) uint8.
    """
    if images.dtype == torch.uint16:
        images = ((images.int() + 128) // 257).to(torch.uint8)
    elif images.dtype != torch.uint8:
        images = to_bytes(images)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay images out in rows on white, as they are ``displayed``.

    Args:
        images: (N, C, H, W), uint8, uint16 or float in [-1, 1].
        columns: Images per row; None makes the grid about square.

    Returns:
        (3, H', W') uint8.

    Raises:
        ValueError: If there are no images.
    """
    if len(images) == 0:
        raise ValueError("grid: got no images, expected at least one")
    images = displayed(images)
    if len(images) == 1:  # it would not frame a single one
        return images[0]
    from torchvision.utils import make_grid  # here: its import takes longer than --help may

    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    tiled = make_grid(images, columns, GAP, pad_value=255)
    return tiled[:, GAP:-GAP, GAP:-GAP]  # it also frames them


def write_png(path: str | Path, image: Tensor, text: Mapping[str, str]) -> None:
    """Write an image atomically, with ``text`` in the file's text chunks.

    Args:
        path: Target; its folder is made.
        image: (C, H, W) with C = 1, 3 or 4: uint8, uint16, or float in [-1, 1], which gets 8 bits.
        text: Metadata of the file, e.g. prompt and seed; keys of at most 79 Latin-1 letters.
    """
    image = to_bytes(image) if image.is_floating_point() else image
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(encode_png(pixels, info))


def read_text(path: str | Path) -> dict[str, str]:
    """Read the text chunks of a PNG that come before its pixels, as those of ``write_png``."""
    with Image.open(path) as image:
        return {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
