"""How fast is the loader beside bare decoders and webdataset? ``python -m benchmarks.loader [--rounds 5]``.

JPEG of 256 pixels, and of 512 x 384 cropped and resized to 256: bare loops of Pillow, torchvision and, where
it is installed, simplejpeg; webdataset's pipeline with Pillow; and ours with 0, 1 and 2 workers, in turn.
Rates are images per second of processor time, workers included: busy neighbours do not count.
Ours decodes with the fastest decoder that is installed; ``LDM_JPEG=torchvision`` names another one.

``--running-on`` measures ours alone by the clock, with 1, 2 and 4 workers that have begun, and computes from
the processor time of an image, in workers and in the main process, what to expect of more cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode

from benchmarks.scale import image, shard
from ldm.data import jpeg
from ldm.data.module import Shards
from ldm.data.raster import shown
from ldm.data.readers import IndexedSource
from ldm.data.source import DataRank, make_loader, rank_batches
from ldm.data.view import View

SIDE, BATCH = 256, 64
SIZES = {"256 px": (256, 256), "512 x 384 to 256": (384, 512)}
RESIZED = f"bare {jpeg.CHOSEN}, crop and resize"
"""The same without a file, a batch and all else: what decoding and resizing cost alone."""
Run = Callable[[int], object]
"""Decodes at least so many images."""


def cpu() -> float:
    """Return the processor time of this process and of its children that ended, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def pillow(content: bytes) -> Any:
    """Decode with Pillow."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def torchvision(content: bytes) -> Tensor:
    """Decode with torchvision, by its operator: the function around it takes longer."""
    found: Tensor = torch.ops.image.decode_jpeg(
        torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB.value, False
    )
    return found


def bare(decode: Callable[[bytes], object], contents: list[bytes]) -> Run:
    """Decode in a loop that does nothing else."""

    def run(num: int) -> None:
        for n in range(num):
            decode(contents[n % len(contents)])

    return run


def ours(path: Path, workers: int) -> Run:
    """Read as ``ldm.fit`` does."""
    data = Shards(str(path), str(path), image_size=SIDE, batch_size=BATCH, fields=["image", "text"])

    source = cast(IndexedSource, data.source)

    def run(num: int) -> None:
        batches = [list(range(n, n + BATCH)) for n in range(0, num, BATCH)]
        for batch in make_loader(source, batches, BATCH, workers, DataRank(0, 1)):
            assert batch["image"].shape == (BATCH, 3, SIDE, SIDE)

    return run


@dataclass(frozen=True)
class Rate:
    """What a loader does that has been running for a while.

    Args:
        images: Images per second of wall-clock time.
        main: Processor seconds of an image in the process that takes the batches.
        worker: The same in the workers.
    """

    images: float
    main: float
    worker: float

    def expected(self, workers: int, cores: int) -> float:
        """Return images per second with other numbers: what workers, main process and cores allow."""
        return min(workers / self.worker, 1 / self.main, cores / (self.main + self.worker))


def running_on(path: Path, workers: int, num: int) -> Rate:
    """Read as ``ldm.fit`` does, without its start: measured once each worker has given some batches."""
    data = Shards(str(path), str(path), image_size=SIDE, batch_size=BATCH, fields=["image", "text"])
    batches = rank_batches(0, BATCH, DataRank(0, 1))
    loader = make_loader(cast(IndexedSource, data.source), batches, BATCH, workers, DataRank(0, 1))
    found: Any = iter(loader)
    for _ in range(4 * workers):
        next(found)
    processes = [process.pid for process in found._workers]
    begun, main, worker = time.perf_counter(), time.process_time(), sum(map(spent, processes))
    for _ in range(num // BATCH):
        next(found)
    images = num // BATCH * BATCH
    return Rate(
        images / (time.perf_counter() - begun),
        (time.process_time() - main) / images,
        (sum(map(spent, processes)) - worker) / images,
    )


def spent(pid: int) -> float:
    """Return the processor time of a process, in seconds (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def growth(path: Path, num: int, rounds: int) -> str:
    """Measure 1, 2 and 4 workers, and say what is to be expected of more cores."""
    counts, rates = (1, 2, 4), dict[int, list[Rate]]()
    for _ in range(rounds):
        for count in counts:
            rates.setdefault(count, []).append(running_on(path, count, num))
    lines = [
        "| workers | images per second | ms of main process per image | ms of a worker |",
        "|---|---|---|---|",
    ]
    for count, found in rates.items():
        images, main, worker = (
            statistics.median(getattr(each, name) for each in found) for name in ("images", "main", "worker")
        )
        lines.append(f"| {count} | {images:,.0f} | {main * 1e3:.3f} | {worker * 1e3:.3f} |")
    one = sorted(rates[1], key=lambda each: each.worker)[rounds // 2]
    beyond = ", ".join(f"{one.expected(n, n):,.0f} with {n} of each" for n in (8, 16, 32))
    limit = f"the main process is the limit from {one.worker / one.main:.0f} workers on"
    return "\n".join(
        [*lines, "", f"Expected of more cores and workers, from one worker's times: {beyond}; {limit}"]
    )


def webdataset(path: Path, workers: int) -> Run:
    """Read with webdataset's pipeline, Pillow, and torch's stacking."""

    def tensor(found: Image.Image) -> Tensor:
        if found.size != (SIDE, SIDE):
            found = ImageOps.fit(found, (SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(found)).permute(2, 0, 1).contiguous()

    def run(num: int) -> None:
        each = num // BATCH // max(1, workers)
        pipeline = wds.WebDataset([str(path)] * max(1, workers), shardshuffle=False, empty_check=False)
        decoded = pipeline.shuffle(100).decode("pil").to_tuple("jpg", "txt")
        samples = decoded.map_tuple(tensor, str)
        batches = samples.batched(BATCH, collation_fn=wds.filters.default_collation_fn).with_epoch(each)
        loader: Iterable[Any] = wds.WebLoader(batches, batch_size=None, num_workers=workers)
        assert sum(len(texts) for _, texts in islice(loader, num)) >= num - BATCH * max(1, workers)

    return run


def ways(path: Path, contents: list[bytes]) -> dict[str, Run]:
    """Make everything that is measured with images of one size."""
    found = {"bare Pillow": bare(pillow, contents), "bare torchvision": bare(torchvision, contents)}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        found["bare simplejpeg"] = bare(simplejpeg.decode_jpeg, contents)
    view = View(SIDE, SIDE)
    found[RESIZED] = bare(lambda content: shown(jpeg.pixels(content), view), contents)
    found |= {f"webdataset, {n} workers": webdataset(path, n) for n in (0, 1)}
    return found | {f"ours ({jpeg.CHOSEN}), {n} workers": ours(path, n) for n in (0, 1, 2)}


def measure(runs: dict[str, Run], num: int, rounds: int) -> dict[str, float]:
    """Return the median images per second and core of each way, in turn."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = cpu()
            run(num if number else BATCH)  # first for what is loaded once
            if number:
                rates[name].append(num / (cpu() - started))
    return {name: statistics.median(found) for name, found in rates.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1536, help="Images of a measurement, a multiple of 64.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--running-on",
        action="store_true",
        help="Only ours, with 1, 2 and 4 workers that have begun, by the clock.",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*suggested max number of worker.*")  # that is the question
    for title, (height, width) in SIZES.items():
        contents = [image(seed, height, width) for seed in range(64)]
        with tempfile.TemporaryDirectory() as folder:
            path = shard(Path(folder) / "images.tar", options.images, "jpg", contents)
            if options.running_on:
                print(f"\n{title}\n\n{growth(path, options.images, options.rounds)}", flush=True)
                continue
            rates = measure(ways(path, contents), options.images, options.rounds)
        fastest = max(rate for name, rate in rates.items() if name.startswith("bare") and name != RESIZED)
        kilobytes = statistics.mean(len(content) for content in contents) / 1e3
        heads = ("images per second and core", "of the fastest bare decoder", "of it with crop and resize")
        print(f"\n| {title}, {kilobytes:.0f} kB | {' | '.join(heads)} |\n|---|---|---|---|")
        for name, rate in rates.items():
            shares = f"{rate / fastest:.2f} | {rate / rates[RESIZED]:.2f}"
            print(f"| {name} | {rate:,.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
