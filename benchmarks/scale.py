"""The parts that docs/scale.md plans with, measured on one core: ``python -m benchmarks.scale``.

Reads shards of 256 x 256 images and of latents as training does, builds indices, and sets up the order of a
billion samples. ``benchmarks.checkpoints`` measures checkpoints.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.nn import functional as F

from ldm.data.bucket_order import BucketOrder
from ldm.data.fields import whitelist
from ldm.data.index import Summary, scan, summarize_all
from ldm.data.module import Shards
from ldm.data.order import Order
from ldm.data.table import read, write

SIDE, FACTOR, CHANNELS = 256, 8, 4


def image(seed: int, height: int = SIDE, width: int = SIDE) -> bytes:
    """Draw a JPEG with about as much detail as a photograph: noise at all scales, 1/f."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.randn(1, 3, n, n, generator=generator) for n in (2, 4, 8, 16, 32, 64, 128, 256))
    layered = sum(F.interpolate(x, (height, width), mode="bicubic") / (i + 1) for i, x in enumerate(layers))
    pixels = (layered[0] * 40 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()  # type: ignore[index]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def latent() -> bytes:
    """Make mean and deviation of a latent as ldm.encode stores them."""
    buffer = io.BytesIO()
    np.save(
        buffer,
        np.random.default_rng(0).random((2 * CHANNELS, SIDE // FACTOR, SIDE // FACTOR)).astype("float16"),
    )
    return buffer.getvalue()


def shard(path: Path, count: int, member: str, contents: list[bytes], first: int = 0) -> Path:
    """Write a shard of ``count`` captioned samples, numbered from ``first`` on."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for i in range(first, first + count):
            text = f"a caption of ordinary length, number {i}, as people write them".encode()
            writer.write({"__key__": f"{i:09d}", member: contents[i % len(contents)], "txt": text})
    return path


def reading(path: Path, field: str, val: Path, batches: int) -> tuple[float, float]:
    """Return samples and megabytes per second of reading and decoding in this process."""
    data = Shards(str(path), str(val), image_size=SIDE, batch_size=64, fields=[field, "text"])
    data.setup("fit")
    stream: Iterator[object] = iter(data.train_dataloader())
    next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    rate = batches * 64 / (time.perf_counter() - started)
    return rate, rate * path.stat().st_size / scan(str(path)).keys.size / 1e6


def indexing(path: Path, count: int) -> tuple[float, float, float]:
    """Return samples scanned per second, bytes of index per sample, and seconds to open one that is there."""
    started = time.perf_counter()
    summarize_all([str(path)], None)
    built = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(10):
        summarize_all([str(path)], None)
    opened = (time.perf_counter() - started) / 10
    return count / built, Path(f"{path}.index.npz").stat().st_size / count, opened


def ordering(num_shards: int, per_shard: int, group: int) -> tuple[float, float, float]:
    """Return seconds to plan an epoch and to seek into the next group, and samples located per second."""
    order = Order([per_shard] * num_shards, 0, group)
    started = time.perf_counter()
    order.locate(0)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    order.locate(len(order) // 2)
    sought = time.perf_counter() - started
    started = time.perf_counter()
    for position in range(len(order) // 2, len(order) // 2 + 20_000):
        order.locate(position)
    return planned, sought, 20_000 / (time.perf_counter() - started)


def bucketing(
    num_shards: int, per_shard: int, num_buckets: int, batch_size: int
) -> tuple[float, float, float]:
    """Return seconds and MB up to the first sample in buckets, counts included, and samples per second then.

    Each bucket has 3/4 of the samples of the one before it.
    """
    shares = 0.75 ** np.arange(num_buckets)
    counts = np.random.default_rng(0).multinomial(per_shard, shares / shares.sum(), size=num_shards)
    started = time.perf_counter()
    order = BucketOrder(counts, 0, 8, batch_size)
    order.locate(0)
    planned = time.perf_counter() - started
    started = time.perf_counter()
    for position in range(len(order) // 2, len(order) // 2 + 20_000):
        order.locate(position)
    rate = 20_000 / (time.perf_counter() - started)
    tracemalloc.start()
    order = BucketOrder(counts, 0, 8, batch_size)
    for batch in range(1024):  # of every bucket
        order.locate(batch * batch_size)
    peak = tracemalloc.get_traced_memory()[1] + counts.nbytes
    tracemalloc.stop()
    return planned, peak / 1e6, rate


def files(folder: Path, samples: int, batches: int) -> dict[str, str]:
    """Measure what reads shards."""
    photos = shard(folder / "images.tar", samples, "jpg", [image(i) for i in range(32)])
    latents = shard(folder / "latents.tar", samples, "latent.npy", [latent()])
    scanned, size, opened = indexing(photos, samples)
    rows = {
        "index of a shard: samples per second; bytes per sample": f"{scanned:,.0f}; {size:.0f}",
        "opening an index that is there": f"{opened * 1e3:.1f} ms",
    }
    fields: dict[str, Path] = {"image": photos, "latent": latents}
    for field, path in fields.items():
        rate, megabytes = reading(path, field, photos, batches)
        size = path.stat().st_size / samples / 1e3
        rows[f"{field}s of {size:.0f} kB: samples; MB per second and core"] = f"{rate:,.0f}; {megabytes:.0f}"
    return rows


def orders() -> dict[str, str]:
    """Measure the order of a billion samples."""
    planned, sought, located = ordering(100_000, 10_000, 8)
    first, memory, rate = bucketing(100_000, 10_000, 20, 256)
    summaries = [
        Summary(f"{i:06d}.tar", 1, 1, 10_000, dict.fromkeys(whitelist(), 10_000)) for i in range(100_000)
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "table.npz", summaries)
        started = time.perf_counter()
        read(Path(folder) / "table.npz", [summary.path for summary in summaries])
        table = time.perf_counter() - started
    return {
        "table of 100,000 shards: read": f"{table * 1e3:.0f} ms",
        "order of a billion samples in 100,000 shards: first sample": f"{planned * 1e3:.0f} ms",
        "any other sample; samples per second from there": f"{sought * 1e3:.0f} ms; {located:,.0f}",
        "the same in 20 buckets: first sample": f"{first * 1e3:.0f} ms",
        "memory of all buckets' orders; samples per second": f"{memory:.0f} MB; {rate:,.0f}",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000, help="Of each shard that is read.")
    parser.add_argument("--batches", type=int, default=40, help="Of 64, that are read.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = {**files(Path(folder), options.samples, options.batches), **orders()}
    rows["largest memory"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    print("| part | measured |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
