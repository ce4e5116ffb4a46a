"""Images as a packer reads them, reduces them and writes them: as RGB of 8 bits, or as a declared kind."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod

from PIL import Image
from typing_extensions import override

from ldm.data import raster
from ldm.data.kinds import decoded, stored
from ldm.data.view import View
from ldm.io.png import encode_png
from ldm.types import ImageKind

_TIFF = (b"II*\0", b"MM\0*")


class PackedImage(ABC):
    """An image to pack, decoded by the code that will read it in training.

    Args:
        content: Its file.

    Raises:
        ValueError: If it cannot be decoded, or not without a loss as the kind that was asked for.
    """

    def __init__(self, content: bytes) -> None:
        self.is_tiff = content.startswith(_TIFF)
        self.content = encode_png(stored(content, ("TIFF",))) if self.is_tiff else content
        """The file, as PNG where shards do not hold its format."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""

    @abstractmethod
    def reduced(self, side: int, kind: str) -> tuple[bytes, str]:
        """Bring the shorter side down to ``side``; return the file and its suffix, which was ``kind``."""

    @abstractmethod
    def low_res(self, side: int) -> bytes:
        """Return a PNG whose shorter side is ``side``."""


class RGBImage(PackedImage):
    """An image that is read as RGB of 8 bits."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.image = Image.fromarray(raster.rgb(self.content).permute(1, 2, 0).numpy())

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.image.size

    @override
    def reduced(self, side: int, kind: str) -> tuple[bytes, str]:
        """PNG stays PNG, the others become JPEG of quality 95."""
        small, out = self.image.resize(scaled(self.size, side), Image.Resampling.LANCZOS), io.BytesIO()
        if kind == "png":
            return png(small), "png"
        small.save(out, "JPEG", quality=95)
        return out.getvalue(), "jpg"

    @override
    def low_res(self, side: int) -> bytes:
        return png(self.image.resize(scaled(self.size, side), Image.Resampling.BOX))


class KindImage(PackedImage):
    """An image that is read as a declared kind, and becomes PNG of it where it is resized.

    Args:
        content: Its file.
        kind: Channels and bits.
    """

    def __init__(self, content: bytes, kind: ImageKind) -> None:
        super().__init__(content)
        self.pixels, self.kind = decoded(self.content, kind), kind

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    @override
    def reduced(self, side: int, kind: str) -> tuple[bytes, str]:
        return self.low_res(side), "png"

    @override
    def low_res(self, side: int) -> bytes:
        width, height = scaled(self.size, side)
        return encode_png(raster.shown(self.pixels, View(height, width)).permute(1, 2, 0).numpy())


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height of an image whose shorter side becomes ``side``."""
    scale = side / min(size)
    return max(side, round(size[0] * scale)), max(side, round(size[1] * scale))


def png(image: Image.Image) -> bytes:
    """Encode a PNG."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
