"""Shards written with the standard library, so that these tests do not depend on our own writer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def png(shade: int, size: int = 8) -> bytes:
    """A grey image whose value tells which sample it is."""
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), shade % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    captions = {"captions": [f"n{number} a", f"n{number} b", f"n{number} c"], "label": number % 10}
    key = f"{number:06d}"
    return [
        (f"{key}.png", png(number)),
        (f"{key}.txt", f"number {number}\n".encode()),
        (f"{key}.json", json.dumps(captions).encode()),
    ]


def write_shards(folder: Path, counts: list[int], name: str = "train", first: int = 0) -> str:
    """Write shards with consecutively numbered samples and return their pattern."""
    for shard, count in enumerate(counts):
        files = [file for number in range(first, first + count) for file in sample(number)]
        write_tar(folder / f"{name}-{shard:06d}.tar", files)
        first += count
    return str(folder / f"{name}-{{000000..{len(counts) - 1:06d}}}.tar")
