"""What training reads that is continued by other numbers of processes: sets, buckets, and both."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.kills.continued import kill_continued
from data.shapes.packer import Settings, pack
from ldm.data.writer import tar_writer

SHARDS, SHARD_SIZE = 6, 20
"""Of images of all shapes."""
SHAPES = ((32, 32),) * 7 + ((20, 32),) * 6 + ((32, 20),) * 5 + ((8, 32),) + ((32, 8),)
"""Height and width of the images in turn; of the last two there are fewer than a global batch."""
DAMAGED = (13, 47, 101)
"""Images of which only the size can be read: the next one of their set and bucket takes their place."""
IN_BUCKETS = {
    "buckets": {"multiple": 4, "max_ratio": 4.0},
    "augment": {"flip": 0.5, "crop": "random"},
}


def kill_mixture(folder: Path, shards: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill training on two sets, see ``kill_continued``."""
    data = {"train": _two_sets(shards, 2, 3)}
    return kill_continued(folder, shards, data, kills, chance)


def kill_buckets(folder: Path, shards: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill training on images of all shapes, see ``kill_continued``."""
    shaped = _pack_shaped(folder)
    data = {"train": str(shaped / f"train-{{000000..{SHARDS - 1:06d}}}.tar"), **IN_BUCKETS}
    return kill_continued(folder, shards, data, kills, chance)


def kill_mixed_buckets(folder: Path, shards: Path, kills: int, chance: random.Random) -> list[str]:
    """Kill training on two sets of images of all shapes, see ``kill_continued``."""
    data = {"train": _two_sets(_pack_shaped(folder), 4, SHARDS), **IN_BUCKETS}
    return kill_continued(folder, shards, data, kills, chance)


def _two_sets(shards: Path, first: int, count: int) -> dict[str, Any]:
    """Make a set of the first of ``count`` shards, and one of the others."""
    paths = [str(shards / f"train-{number:06d}.tar") for number in range(count)]
    return {
        "long": {"shards": paths[:first], "weight": 0.7, "filter": "caption_length >= 57"},
        "short": {"shards": paths[first:], "weight": 0.3, "caption": "a shape"},
    }


def _pack_shaped(folder: Path) -> Path:
    """Pack images of all shapes, some of them damaged; return the folder of their shards."""
    square, shaped = folder / "square", folder / "shaped"
    pack(square, Settings(train=SHARDS * SHARD_SIZE, val=1, novel=1, pairs=1, shard_size=SHARD_SIZE))
    shaped.mkdir()
    count = 0
    for path in sorted(square.glob("train-*.tar")):
        with tarfile.open(path) as tar, tar_writer(shaped / path.name) as out:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            for key in dict.fromkeys(name.split(".")[0] for name in members):
                sample: dict[str, Any] = {kind: members[f"{key}.{kind}"] for kind in ("png", "txt", "json")}
                image = _cropped(sample["png"], *SHAPES[count % len(SHAPES)])
                sample["png"] = image[: len(image) // 2] if count in DAMAGED else image
                out.write({"__key__": key, **sample})
                count += 1
    return shaped


def _cropped(png: bytes, height: int, width: int) -> bytes:
    """Return the top left of an image."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.crop((0, 0, width, height)).save(out, "PNG")
    return out.getvalue()
