"""Samples on their way to the encoder: read and decoded by workers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from ldm.data.buckets import Size
from ldm.data.decode import BadSample, Members, captions
from ldm.data.fields import FIELDS, decode_sample, whitelist
from ldm.data.files import ShardFiles
from ldm.data.raster import stored_size
from ldm.data.rows import Rows
from ldm.data.source import AHEAD
from ldm.data.view import View
from ldm.types import RGB8, ImageKind

Place = tuple[int, int, int]
"""Shard, row, and bucket of a sample."""


@dataclass(frozen=True)
class EncodingItem:
    """A sample to encode.

    Args:
        key: The sample's.
        members: Its files.
        image: (C, H, W), as it is stored, or None.
        texts: Captions that are encoded.
        bad: What is wrong with it, or None.
    """

    key: str
    members: dict[str, bytes]
    image: torch.Tensor | None
    texts: Sequence[str] = ()
    bad: str | None = None


EncodingBatch = tuple[list[EncodingItem], torch.Tensor | None]
"""Items without their images, and the images (B, C, H, W) of the good ones."""


class EncodingDataset(Dataset[EncodingItem]):
    """The items of shards, by (shard, row, bucket).

    Args:
        files: The shards.
        sizes: Height and width of the images of each bucket, in pixels.
        has_text: Whether captions are encoded too.
        kind: Channels and bits of the images.
    """

    def __init__(
        self, files: ShardFiles, sizes: Sequence[Size], has_text: bool = False, kind: ImageKind = RGB8
    ) -> None:
        self.files = files
        files.is_sequential = True
        self.has_text = has_text
        self.views = [View(*size, kind=kind) for size in sizes]

    def __getitem__(self, place: Place) -> EncodingItem:
        shard, row, bucket = place
        self.files.prefetch(shard, lambda: ([shard], range(shard + 1, len(self.files.summaries))[:AHEAD]))
        members, sample = self.files.members(shard, row, whitelist())
        try:
            image = decode_sample(members, sample, ["image"], self.views[bucket])["image"]
            texts = captions(Members(members, sample, self.views[bucket])) if self.has_text else []
            kept = members if len(self.views) == 1 else _sized(Members(members, sample))
        except BadSample as error:
            return EncodingItem(sample.key, members, None, bad=str(error))
        return EncodingItem(sample.key, kept, image, texts)


def _sized(members: Members) -> dict[str, bytes]:
    """Return the members with the size of the image in the json: without its image nothing else tells."""
    meta, content = members.json(), dict(members.content)
    if "height" in meta and "width" in meta:
        return content
    image = next(content[name] for name in FIELDS["image"].members if name in content)
    height, width = stored_size(image)
    return {**content, "json": json.dumps({**meta, "height": height, "width": width}).encode()}


def batches(shard: int, rows: Rows, size: int) -> Iterator[list[Place]]:
    """Yield the places of batches of one bucket each: bucket after bucket, in each the order of the tar."""
    for bucket, count in enumerate(rows.counts[shard].tolist()):
        for start in range(0, count, size):
            numbers = range(start, min(start + size, count))
            yield [(shard, rows.row(shard, bucket, k), bucket) for k in numbers]


def num_batches(shard: int, rows: Rows, size: int) -> int:
    """Count the batches of a shard."""
    return sum(-(-count // size) for count in rows.counts[shard].tolist())


def collate(items: list[EncodingItem]) -> EncodingBatch:
    """Take the images out of items: each alone would cost a file descriptor on its way from a worker."""
    images = [item.image for item in items if item.image is not None]
    return [replace(item, image=None) for item in items], torch.stack(images) if images else None
