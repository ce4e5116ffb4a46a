"""Images as files: rounding to bytes, grids, and PNGs that say how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.io.atomic import replacing

GAP = 2
"""Pixels between the images of a grid."""


def to_bytes(image: Tensor) -> Tensor:
    """Round images (..., 3, H, W) in [-1, 1] to uint8 in [0, 255]; values outside are clamped."""
    return ((image.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


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
    """Map uint8 images (..., 3, H, W) to float32 in [-1, 1]; inverts ``to_bytes`` on its results."""
    return image.float() / 127.5 - 1.0


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Lay images out in rows on white.

    Args:
        images: (N, 3, H, W), uint8 or float in [-1, 1].
        columns: Images per row; None makes the grid about square.

    Returns:
        (3, H', W') uint8.

    Raises:
        ValueError: If there are no images.
    """
    if len(images) == 0:
        raise ValueError("grid: got no images, expected at least one")
    if images.dtype != torch.uint8:
        images = to_bytes(images)
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
        image: (3, H, W), uint8 or float in [-1, 1].
        text: Metadata of the file, e.g. prompt and seed; keys of at most 79 Latin-1 letters.
    """
    image = image if image.dtype == torch.uint8 else to_bytes(image)
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()
    with replacing(Path(path)) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def read_text(path: str | Path) -> dict[str, str]:
    """Read the text chunks of a PNG that come before its pixels, as those of ``write_png``."""
    with Image.open(path) as image:
        return {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
