"""The second reader: webdataset's own pipeline, for stores too large to index or to stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from random import Random
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from ldm.data.decode import BadSample, SampleId
from ldm.data.fields import Sample, collate, decode_sample, whitelist
from ldm.data.order import mix, permutation
from ldm.data.readers import Reader
from ldm.data.source import MAX_BAD, DataRank, SampleSpec, Source
from ldm.data.tar import expand, split_name, urls


class Streaming(Reader):
    """Reads training shards from front to back through webdataset. It resumes by shard, not by sample.

    A resumed run begins again with the shards that were being read: some of their samples come twice, and
    what the shuffle buffer still held of the shards before them is left out. The order depends on the number
    of processes and workers; the length is not known. Each worker of each process reads every n-th shard of
    an endless sequence in which each epoch has its own order. Members of a sample must be adjacent. Shards
    may be local paths or URLs that webdataset opens without a shell (http, https, gs ...); 'pipe:' is
    refused. Validation shards are local and read through their index, as exactly once matters there.

    Args:
        shuffle_buffer: Samples among which each next one is drawn; 1 keeps the order of the shards.
        index_dir: Folder for the indices of validation shards; None writes each beside its shard.
    """

    def __init__(self, shuffle_buffer: int = 1000, index_dir: str | None = None) -> None:
        super().__init__(index_dir)
        if shuffle_buffer < 1:
            raise ValueError(
                f"data.reader.init_args.shuffle_buffer: got {shuffle_buffer}, expected at least 1"
            )
        self.shuffle_buffer = shuffle_buffer

    def open(self, patterns: str | Sequence[str], spec: SampleSpec) -> StreamingSource:
        """Open training shards and look at the first sample.

        Raises:
            ValueError: If it lacks one of the fields, or the shards are not listed plainly.
        """
        source = StreamingSource(_shards(patterns), spec, self.shuffle_buffer)
        first = next(iter(_samples([{"url": source.shards[0], "turn": 0}])), None)
        if first is None:
            raise ValueError(
                f"{source.shards[0]}: empty shard, expected KEY.jpg, KEY.txt ... (data/README.md)"
            )
        try:
            _decode(first, spec)
        except BadSample as error:
            raise ValueError(f"data.fields: asks for {list(spec.fields)}, but {error}") from error
        return source


class StreamingSource(Source):
    """An endless stream of samples from shards read front to back.

    Args:
        shards: Paths or URLs.
        spec: What the samples must hold.
        shuffle_buffer: Samples among which each next one is drawn.
    """

    num_samples = None

    def __init__(self, shards: list[str], spec: SampleSpec, shuffle_buffer: int) -> None:
        self.shards = shards
        self.spec = spec
        self.shuffle_buffer = shuffle_buffer
        self.turn = 0
        """Position in the endless sequence of shards that a resumed run begins with."""
        self._first, self._width = 0, 1

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "reader": "Streaming",
            "shards": len(self.shards),
            "names": [os.path.basename(s) for s in self.shards],
        }

    def loader(
        self, position: Callable[[], int], batch_size: int, num_workers: int, process: DataRank
    ) -> DataLoader[Sample]:
        """Make a loader without end; it begins at ``turn`` and not at ``position``."""
        self._first, self._width = self.turn, process.world_size * max(1, num_workers)
        return DataLoader(
            _Stream(self, process),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
        )

    def observe(self, batch: dict[str, Any]) -> None:
        """Note the furthest shard begun; all ranks are about equally far."""
        turn = batch.pop("turn")
        self.turn = max(self.turn, turn - (turn - self._first) % self._width)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turn = int(state["turn"])


class _Stream(IterableDataset[Sample]):
    """The pipeline of one process; a worker takes its part of it."""

    def __init__(self, source: StreamingSource, process: DataRank) -> None:
        self.shards, self.spec, self.buffer = source.shards, source.spec, source.shuffle_buffer
        self.source, self.process = source, process

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        index = self.process.rank * num_workers + worker  # of this worker among those of all processes
        turns = islice(self._turns(self.source.turn), index, None, self.process.world_size * num_workers)
        rng = Random(mix(self.spec.seed, self.source.turn, index))
        raw = wds.filters.shuffle(self.buffer, initial=self.buffer, rng=rng)(_samples(turns))
        return _decoded(raw, self.spec)

    def _turns(self, first: int) -> Iterator[dict[str, Any]]:
        """Yield the endless sequence of shards from ``first`` on; each epoch has an order of its own."""
        for turn in count(first):
            epoch, within = divmod(turn, len(self.shards))
            shard = permutation(len(self.shards), self.spec.seed, epoch)[within]
            yield {"url": self.shards[shard], "turn": turn}


def _shards(patterns: str | Sequence[str]) -> list[str]:
    found: list[str] = []
    for url in urls(patterns, "data.train"):
        found += [url] if "://" in url else expand(url, "data.train")
    return found


def _samples(turns: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield raw samples, whitelisted members only, with the "turn" of their shard."""
    for turn in turns:
        try:
            for sample in wds.tariterators.tarfile_samples(iter([dict(turn)]), select_files=_is_whitelisted):
                yield {**sample, "turn": turn["turn"]}
        except Exception as error:  # webdataset and its openers raise anything
            reason = str(error).replace("\n", " ")
            raise ValueError(f"{turn['url']}: cannot be read as a tar ({reason:.200})") from error


def _is_whitelisted(name: str) -> bool:
    key, extension = split_name(name)
    return key is not None and extension in whitelist()


def _decoded(raw: Iterable[dict[str, Any]], spec: SampleSpec) -> Iterator[Sample]:
    """Decode; a bad sample is dropped, and the next one says so."""
    skipped: list[str] = []
    for members in raw:
        try:
            sample = _decode(members, spec)
        except BadSample as error:
            skipped.append(str(error))
            if len(skipped) >= MAX_BAD:
                raise ValueError(
                    f"{MAX_BAD} samples in a row cannot be used, the last one: {error}"
                ) from error
            continue
        yield {**sample, "skipped": skipped} if skipped else sample
        skipped = []


def _decode(raw: dict[str, Any], spec: SampleSpec) -> Sample:
    sample = SampleId(raw["__url__"], raw["__key__"].removeprefix("./"))
    members = {name: raw[name] for name in whitelist(spec.fields) if name in raw}
    # the key, not a counter, draws the caption: a counter would depend on the worker
    draw = spec.draw(raw["turn"], int.from_bytes(sample.key.encode()[-8:], "big"))
    return {**decode_sample(members, sample, spec.fields, spec.image_size, draw), "turn": raw["turn"]}


def _collate(samples: Sequence[Sample]) -> Any:
    batch: Any = collate(samples)
    batch["turn"] = max(batch["turn"])
    return batch
