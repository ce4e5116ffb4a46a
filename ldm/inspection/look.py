"""One look at a sample: what it holds, by the code that reads it in training."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data import raster
from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import FIELDS, IMAGES, decode_sample, whitelist
from ldm.data.files import ShardFiles
from ldm.data.kinds import GREY
from ldm.data.view import View
from ldm.io.images import displayed
from ldm.types import RGB8, ImageKind

SIDE = 96
"""Side in pixels of the images that are looked at."""
CELLS = 8
"""Side of the grid of an average hash."""
_FLAT = 2.0
"""Standard deviation of grey values below which an image has no average hash: all flat ones would agree."""
_PNG_BITS = 24
"""Byte of a PNG that holds the bits per channel."""


@dataclass(frozen=True)
class Picture:
    """What is known of an image.

    Args:
        height: In pixels, as it is decoded.
        width: In pixels.
        format: As Pillow names it.
        mode: As Pillow names it: "RGB", "L", "CMYK" ...
        channels: Of the pixels: 1 grey, 2 with alpha, 3 colours, 4 with alpha.
        bits: Per channel, as the file stores them.
        digest: Hash of its bytes.
        average: Average hash of its central square; None for a flat one.
        thumbnail: JPEG of it; empty unless it was asked for.
    """

    height: int
    width: int
    format: str
    mode: str
    channels: int
    bits: int
    digest: bytes
    average: int | None
    thumbnail: bytes = b""


@dataclass
class Look:
    """What one sample holds.

    Args:
        shard: Path of its shard.
        key: Its key.
        fields: Fields that it gives.
        bad: Reason and message of each field that cannot be used.
        picture: Of its image, if that can be used.
        caption: Its canonical caption; None without one.
        tokens: Of the caption, begin and end marks included.
        label: Its class; None without one.
    """

    shard: str
    key: str
    fields: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    picture: Picture | None = None
    caption: str | None = None
    tokens: int = 0
    label: int | None = None


class Samples(Dataset[Look]):
    """Looks at samples by their number over all shards.

    Args:
        files: The shards.
        count_tokens: Counts the tokens of captions.
        shown: Numbers of the samples that get a thumbnail.
        kind: Kind that images are decoded as: what it refuses is a bad sample.
    """

    def __init__(
        self,
        files: ShardFiles,
        count_tokens: Callable[[Sequence[str]], list[int]],
        shown: Collection[int],
        kind: ImageKind = RGB8,
    ) -> None:
        self.files, self.count_tokens, self.shown = files, count_tokens, frozenset(shown)
        self.view = View(SIDE, SIDE, kind=kind)
        self.starts = [0]
        for summary in files.summaries:
            self.starts.append(self.starts[-1] + summary.count)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, number: int) -> Look:
        """Look at a sample; one whose bytes cannot be read is a bad one."""
        shard = next(n for n, end in enumerate(self.starts[1:]) if number < end)
        path, row = self.files.summaries[shard].path, number - self.starts[shard]
        try:
            members, sample = self.files.members(shard, row, whitelist())
        except (OSError, ValueError) as error:
            return Look(path, "", bad=[("unreadable shard", str(error))])
        look = Look(path, sample.key)
        for name in FIELDS:
            self._read(look, name, members, sample, number in self.shown)
        return look

    def _read(
        self, look: Look, name: str, members: dict[str, bytes], sample: SampleId, is_shown: bool
    ) -> None:
        on_image = (
            ["image"] if name in ("mask", "low_res", "label_map", "layout") and "image" in look.fields else []
        )
        try:
            value = decode_sample(members, sample, [*on_image, name], self.view)[name]
        except BadSample as error:
            found = (error.reason, str(error))
            if not error.reason.startswith("missing") and found not in look.bad:  # one member, several fields
                look.bad.append(found)
            return
        look.fields.append(name)
        if name == "image":
            look.picture = _picture(members, displayed(value[None])[0], is_shown)
        elif name == "text":
            look.caption, (look.tokens,) = value, self.count_tokens([value])
        elif name == "label":
            look.label = value


def _picture(members: dict[str, bytes], pixels: Tensor, is_shown: bool) -> Picture:
    content = next(members[name] for name in IMAGES if name in members)
    height, width = raster.stored_size(content)
    with Image.open(io.BytesIO(content), formats=raster.FORMATS) as image:
        kind, mode = str(image.format), image.mode
        channels = (1 if mode in GREY else 3) + image.has_transparency_data
    bits = content[_PNG_BITS] if kind == "PNG" else 8
    thumbnail = _jpeg(pixels) if is_shown else b""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return Picture(height, width, kind, mode, channels, bits, digest, average_hash(pixels), thumbnail)


def average_hash(pixels: Tensor) -> int | None:
    """Hash what an image looks like: a bit for each of 8x8 cells, 1 where it is brighter than the image.

    Args:
        pixels: (3, H, W) uint8, sides multiples of 8.

    Returns:
        64 bits; None for a flat image.
    """
    grey = pixels.float().mean(0)
    if float(grey.std()) < _FLAT:
        return None
    cells = grey.unflatten(0, (CELLS, -1)).unflatten(2, (CELLS, -1)).mean((1, 3))
    bits = (cells > cells.mean()).flatten().tolist()
    return sum(1 << n for n, bit in enumerate(bits) if bit)


def _jpeg(pixels: Tensor) -> bytes:
    out: Any = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(out, "JPEG", quality=85)
    return bytes(out.getvalue())
