"""What may grow with shards: indices, tables, filters, the data module, a checkpoint's part, and readers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

from benchmarks.growth.line import Case
from benchmarks.growth.measure import each, seconds, traced
from benchmarks.scale import image, shard
from ldm.data.fields import Sample
from ldm.data.filters import Filter
from ldm.data.index import Summary, summarize_all
from ldm.data.kept import kept_rows
from ldm.data.module import Indexed, Shards, Streaming
from ldm.data.readers import Reader
from ldm.data.source import DataRank, SampleSpec
from ldm.data.streaming import StreamingSource
from ldm.data.table import read, write
from ldm.data.tar import INDEX
from ldm.latents.manifest import merge_notes, note_shard

SIDE, PER_SHARD, READ = 8, 4, 40
"""Side of the images, samples of a shard, and batches of one sample that are read."""
LISTED = (100, 1_000, 10_000, 100_000)
"""Shards of a list that names a few again and again."""
PROCESSES = 8
"""That share the list."""


class Store:
    """So many real shards of few samples, with their indices.

    Args:
        folder: For the largest number of shards; fewer are the first of them.
        most: Number of shards.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    @cache  # noqa: B019  (one store for a command)
    def paths(self) -> list[str]:
        """Write the shards."""
        content = [image(0, SIDE, SIDE)]
        numbers = range(self.most)
        return [str(shard(self._name(n), PER_SHARD, "jpg", content, n * PER_SHARD)) for n in numbers]

    @cache  # noqa: B019
    def indexed(self) -> list[Summary]:
        """Index them."""
        return summarize_all(self.paths(), None)

    def data(self, num: int, reader: Reader | None = None) -> Shards:
        """Open the first ``num``, of which one validates."""
        self.indexed()
        paths = self.paths()[:num]
        data = Shards(
            paths, paths[:1], batch_size=1, image_size=SIDE, fields=["image"], reader=reader or Indexed()
        )
        data.setup("fit")
        return data

    def stream(self, num: int, reader: Reader | None = None) -> Iterator[Sample]:
        """Open the first ``num`` and begin to read."""
        batches = iter(self.data(num, reader).train_dataloader())
        next(batches)
        return batches

    def _name(self, number: int) -> Path:
        return self.folder / f"{number:06d}.tar"


def _index(store: Store, num: int) -> float:
    """Return seconds to index shards that have no index."""
    for path in store.paths()[:num]:
        Path(path + INDEX).unlink(missing_ok=True)
    return seconds(lambda: summarize_all(store.paths()[:num], None), repeats=1)


def _filtered(store: Store, num: int, is_counted: bool) -> float:
    """Return seconds to count the samples that a filter keeps, or to read the counts of an earlier start."""
    summaries = store.indexed()[:num]
    kept = Filter("min(width, height) >= 4", "data.filter")
    if is_counted:
        kept_rows(summaries, None, kept)
    else:
        _forget(store.folder)
    return seconds(lambda: kept_rows(summaries, None, kept), repeats=3 if is_counted else 1)


def _forget(folder: Path) -> None:
    for pattern in (".shards-*", "*.meta*"):
        for path in folder.glob(pattern):
            path.unlink()


def _table(folder: Path, num: int) -> float:
    """Return seconds to write and read the table of summaries that processes share."""
    summary = Summary("", 1, 1, 10_000, {"jpg": 10_000}, ("a", "b"))
    summaries = [Summary(**{**vars(summary), "path": f"{n:06d}.tar"}) for n in range(num)]
    paths = [each.path for each in summaries]

    def through() -> None:
        write(folder / "table.json", summaries)
        read(folder / "table.json", paths)

    return seconds(through)


def _manifest(folder: Path, num: int) -> float:
    """Return seconds to note shards of latents as encoded, one after the other, and to merge the notes."""
    out = folder / "latents"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()

    def through() -> None:
        for n in range(num):
            note_shard(out, f"{n:06d}.tar", {"samples": 10_000, "source": f"{n:06d}.tar"})
        merge_notes(out, {"autoencoder": {}, "image_size": SIDE, "shards": {}})

    return seconds(through, repeats=1)


def _listed(store: Store, num: int) -> float:
    """Return seconds of a streamed sample of a list of shards, of which a process skips those of others."""
    paths = [store.paths()[n % store.most] for n in range(num)]
    source = StreamingSource(paths, SampleSpec(("image",), SIDE, 0), 1)
    stream = iter(source.loader(lambda: 0, 1, 0, DataRank(0, PROCESSES)))
    next(stream)
    return each(lambda: next(stream), READ)


def _read(batches: Iterable[Sample], num: int) -> None:
    for _ in islice(batches, num):
        pass


def cases(sizes: Sequence[int], folder: Path) -> list[Case]:
    """List what is measured.

    Args:
        sizes: Shards, growing.
        folder: For the shards.
    """
    store = Store(folder, sizes[-1])

    def case(name: str, expected: int, unit: str, measure: Callable[[int], float], floor: float) -> Case:
        return Case(name, "shards", expected, unit, sizes, measure, floor)

    def reading(num: int, reader: Reader | None = None) -> float:
        stream = store.stream(num, reader)
        return each(lambda: next(stream), READ)

    def checkpointed(num: int) -> float:
        data = store.data(num)
        return seconds(data.state_dict)

    def kept(num: int) -> float:
        stream = store.stream(num)
        return traced(lambda: _read(stream, min(num * PER_SHARD, 2_000)))

    return [
        case("build indices", 1, "s", lambda num: _index(store, num), 1e-2),
        case("filter: count", 1, "s", lambda num: _filtered(store, num, False), 1e-2),
        case("filter: counted before", 1, "s", lambda num: _filtered(store, num, True), 1e-3),
        case("table of summaries: write and read", 1, "s", lambda num: _table(folder, num), 1e-3),
        case("latents: notes and manifest", 1, "s", lambda num: _manifest(folder, num), 1e-2),
        case("data: setup", 1, "s", lambda num: seconds(lambda: store.data(num), 1), 1e-2),
        case("data: memory of setup", 1, "MB", lambda num: traced(lambda: store.data(num)), 0.5),
        case("data: state for a checkpoint", 1, "s", checkpointed, 1e-3),
        case("Indexed: the next sample", 0, "s", reading, 2e-3),
        case("Indexed: memory of open shards", 0, "MB", kept, 1.0),
        case("Streaming: setup", 1, "s", lambda num: seconds(lambda: store.data(num, Streaming()), 1), 1e-2),
        case("Streaming: the next sample", 0, "s", lambda num: reading(num, Streaming()), 2e-3),
        Case(
            f"Streaming: a sample, 1 of {PROCESSES} processes",
            "shards",
            0,
            "s",
            LISTED,
            lambda num: _listed(store, num),
            1e-3,
        ),
    ]
