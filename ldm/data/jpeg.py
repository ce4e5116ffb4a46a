"""JPEG straight from libjpeg-turbo to tensors: the pixels that Pillow gives, in half of its time."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

DECODERS = ("torchvision", "simplejpeg")
CHOSEN = os.environ.get("LDM_JPEG", DECODERS[0])
"""Which of them decodes. The second is an optional package, a fifth faster, with the same pixels."""
if CHOSEN not in DECODERS or importlib.util.find_spec(CHOSEN) is None:
    raise ValueError(f"LDM_JPEG: got {CHOSEN}, expected one of {', '.join(DECODERS)} that is installed")


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
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(content: bytes) -> Tensor:
        found: Tensor = decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB
        )
        return found

    return decode
