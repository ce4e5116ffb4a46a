"""Remote shards: exact under kills and failures, bounded, and how fast: ``python -m benchmarks.remote``.

Two ranks with a worker each read an epoch from a server of S3 (moto), and from a web server that cuts
connections, refuses and delays. They share a cache that holds a third of the shards, and are killed at random
moments (SIGKILL) and started again. Then one process with two workers reads and decodes JPEGs: local files,
the same ones from S3 and over HTTP, and over HTTP with webdataset's own pipeline. Exit code 1 if a sample is
lost, comes twice or in another order, or if the cache exceeds its bound.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import boto3
import numpy as np
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks.remote.failing_server import Fault, serving
from benchmarks.remote.readers import BATCH, FORK, RANKS, Rank, Watch, reader
from benchmarks.scale import image, shard
from ldm.data.module import Indexed
from ldm.data.source import DataRank, SampleSpec
from ldm.data.tar import expand
from ldm.io.atomic import replacing

SIDE, BUCKET = 256, "shards"
HEAD = (
    "| store | samples | kills | lost | doubled | in order | cache / bound | with deleted ones | time |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def faults(name: str, count: int) -> Fault | None:
    """Return what goes wrong with a GET of a shard: with two of five."""
    if not name.endswith(".tar"):
        return None
    chance = random.Random(f"{name} {count}")
    fates: list[tuple[float, Fault | None]] = [
        (0.25, ("cut", chance.random())),
        (0.05, ("status", 503)),
        (0.05, ("status", 429)),
        (0.05, ("slow", 0.3)),
        (0.6, None),
    ]
    return chance.choices([fate for _, fate in fates], [weight for weight, _ in fates])[0]


def _serve_s3(folder: Path, pipe: Connection) -> None:
    from moto.server import ThreadedMotoServer

    logging.disable()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client("s3", endpoint_url=url)
    client.create_bucket(Bucket=BUCKET)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, path.name)
    pipe.send(url)
    time.sleep(10_000)


def _serve_http(folder: Path, pipe: Connection) -> None:
    with serving(folder) as served:
        pipe.send(served.url)
        time.sleep(10_000)


def _serve_failing(folder: Path, pipe: Connection) -> None:
    with serving(folder, faults) as served:
        pipe.send(served.url)
        time.sleep(10_000)


@contextmanager
def process(serve: Callable[[Path, Connection], None], folder: Path) -> Iterator[str]:
    """Run a server in a process of its own; yields its URL."""
    ours, theirs = FORK.Pipe()
    server = FORK.Process(target=serve, args=(folder, theirs), daemon=True)
    server.start()
    try:
        yield ours.recv()
    finally:
        server.kill()


def exactness(pattern: str, local: str, folder: Path, cache_gb: float, kills: int) -> tuple[str, bool]:
    """Read an epoch, with kills; return the row, and whether all is well."""
    source = Indexed(2, index_dir=str(folder / "local")).open(local, SampleSpec(("text",), 8, 0))
    num_batches = (source.num_samples or 0) // (BATCH * RANKS)
    cache, chance, begun = folder / "cache", random.Random(0), time.monotonic()
    ranks = [Rank(pattern, cache, cache_gb, n, folder / f"{n}.txt", num_batches) for n in range(RANKS)]
    with Watch(cache) as watch:
        for rank in ranks:
            rank.start()
        for _ in range(kills):
            time.sleep(chance.uniform(0.2, 1.5))
            victim = chance.choice(ranks)
            if victim.process is not None and victim.process.is_alive():
                victim.process.kill()
            _ended(victim)
            victim.start()
        for rank in ranks:
            _ended(rank)
    seen = Counter(key for rank in ranks for batch in rank.batches for key in batch)
    expected = [source[n]["key"] for n in range(num_batches * BATCH * RANKS)]
    in_order = all(
        [key for batch in rank.batches for key in batch] == expected[rank.rank :: RANKS] for rank in ranks
    )
    lost, doubled = len({*expected} - {*seen}), sum(seen.values()) - len(seen)
    bound = int(cache_gb * 1e9)
    row = (
        f"{len(expected)} | {kills} | {lost} | {doubled} | {'yes' if in_order else 'NO'} | "
        f"{watch.peak / bound:.2f} | {watch.peak_on_disk / bound:.2f} | {time.monotonic() - begun:.0f} s"
    )
    return row, in_order and not lost and not doubled and watch.peak <= bound


def _ended(rank: Rank) -> None:
    if rank.process is not None:
        rank.process.join()


def rate(batches: Iterable[object], num: int, size: int) -> float:
    """Return images per second from the beginning on, without the start of the workers."""
    iterator = iter(batches)
    next(iterator)
    started = time.perf_counter()
    found = sum(1 for _ in islice(iterator, num - 1))
    return found * size / (time.perf_counter() - started)


def ours(pattern: str, cache: Path, cache_gb: float, num: int) -> tuple[Callable[[], float], ...]:
    """Make two measurements of images per second: of an epoch with an empty cache, and with what is there."""
    source = reader(cache, cache_gb).open(pattern, SampleSpec(("image", "text"), SIDE, 0))

    def again() -> float:
        return rate(source.loader(lambda: 0, 64, 2, DataRank(0, 1)), num, 64)

    def first() -> float:
        for path in cache.glob("*.tar"):
            path.unlink()
        return again()

    return first, again


def theirs(urls: list[str], num: int) -> float:
    """Return images per second of webdataset's own pipeline."""
    data = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1), lambda text: text)
        .batched(64)
    )
    return rate(DataLoader(data, batch_size=None, num_workers=2), num, 64)


def main() -> int:
    """Print both tables; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--samples", type=int, default=400, help="Of each shard.")
    parser.add_argument("--kills", type=int, default=10, help="Of each store.")
    options = parser.parse_args()
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "test")
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        size = make(data, options.shards, options.samples)
        names = f"{{000..{options.shards - 1:03d}}}.tar"
        local, cache_gb = str(data / names), (options.shards // 3 + 0.5) * size / 1e9
        with (
            process(_serve_s3, data) as s3,
            process(_serve_failing, data) as failing,
            process(_serve_http, data) as http,
        ):
            os.environ["AWS_ENDPOINT_URL"] = s3
            print(f"{options.shards} shards of {size / 1e6:.1f} MB\n\n{HEAD}", flush=True)
            is_well = True
            for store, url in {"S3": f"s3://{BUCKET}", "HTTP that fails": failing}.items():
                folder = Path(name) / store
                folder.mkdir()
                row, well = exactness(f"{url}/{names}", local, folder, cache_gb, options.kills)
                print(f"| {store} | {row} |", flush=True)
                is_well &= well
            stores = {"S3": f"s3://{BUCKET}/{names}", "HTTP": f"{http}/{names}"}
            speeds(Path(name), local, stores, cache_gb, options.shards * options.samples // 64)
    return 0 if is_well else 1


def speeds(folder: Path, local: str, stores: dict[str, str], cache_gb: float, num: int) -> None:
    """Print images per second, the better of two rounds, and relative to local files."""
    measures = {"local files": ours(local, folder / "none", 1.0, num)[1]}
    for store, pattern in stores.items():
        first, again = ours(pattern, folder / f"{store}-all", 10.0, num)
        measures |= {f"{store}, first epoch": first, f"{store}, staged": again}
        measures[f"{store}, a third fits the cache"] = ours(
            pattern, folder / f"{store}-third", cache_gb, num
        )[1]
    measures["HTTP, webdataset's pipeline"] = partial(theirs, expand(stores["HTTP"], "shards"), num)
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(2):
        for name, measure in measures.items():
            found[name].append(measure())
    print(f"\n| JPEGs of {SIDE} pixels, two workers | images/s | of local |\n|---|---|---|", flush=True)
    for name, rates in found.items():
        print(f"| {name} | {max(rates):.0f} | {max(rates) / max(found['local files']):.2f} |", flush=True)


def make(folder: Path, shards: int, samples: int) -> int:
    """Write shards of JPEGs with captions; return the size of each."""
    pictures = [image(n) for n in range(32)]
    for number in range(shards):
        with replacing(folder / f"{number:03d}.tar") as path:
            shard(path, samples, "jpg", pictures, number * samples)
    return (folder / "000.tar").stat().st_size


if __name__ == "__main__":
    sys.exit(main())
