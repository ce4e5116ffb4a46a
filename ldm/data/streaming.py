"""The second reader: webdataset's own pipeline, for stores too large to index or to stage."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count, islice
from random import Random
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from ldm.data.decode import BadSample, SampleId, Skipped
from ldm.data.fields import Sample, collate, decode_sample, whitelist
from ldm.data.order import mix, permutation
from ldm.data.patience import WAITS, Unreachable
from ldm.data.readers import Reader, Train
from ldm.data.sets import Patterns, named_sets
from ldm.data.source import MAX_BAD, DataRank, SampleSpec, Source, num_bytes
from ldm.data.stored import check_captions
from ldm.data.tar import expand, urls
from ldm.data.tar_stream import NotATar, read_samples
from ldm.hardware import check_shared_memory


class Streaming(Reader):
    """Reads training shards from front to back through webdataset. It resumes by shard, not by sample.

    A resumed run begins again with the shards that were being read: some of their samples come twice, and
    what the shuffle buffer still held of the shards before them is left out. The order depends on the number
    of processes and workers; the length is not known. Each worker of each process reads every n-th shard of
    an endless sequence in which each epoch has its own order. Members of a sample must be adjacent. Shards
    may be local paths or URLs that webdataset opens without a shell (http, https, gs ...); 'pipe:' is
    refused. Validation shards are read through their index, as exactly once matters there.

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

    def open(self, train: Train, spec: SampleSpec) -> StreamingSource:
        """Open training shards and look at the first sample.

        Raises:
            ValueError: If it lacks one of the fields, shards are not listed plainly, or there are filters or
                buckets.
        """
        if spec.buckets is not None:
            raise ValueError(
                "data.buckets: Streaming does not know the sizes of images beforehand, expected Indexed"
            )
        check_captions(spec.fields, {"data.augment.captions": spec.augment.captions})
        shards = _shards(_plain(train))
        raw = _samples({"url": url, "turn": 0} for url in shards)
        reason: BadSample | None = None
        for first in islice(raw, MAX_BAD):
            try:
                sample = _decode(first, spec)
            except BadSample as error:
                reason = reason or error
            else:
                return StreamingSource(shards, spec, self.shuffle_buffer, num_bytes(sample))
        if reason is None:
            raise ValueError(f"{shards[0]}: empty shard, expected KEY.jpg, KEY.txt ... (data/README.md)")
        again = _samples([{"url": shards[0], "turn": 0}])
        keys = [sample["__key__"] for sample in islice(again, 10_000)]
        is_mixed = len(keys) > len({*keys})
        hint = ": members of a sample must be neighbours (tar --sort=name)" if is_mixed else ""
        raise ValueError(f"data.fields: asks for {list(spec.fields)}, but {reason}{hint}")


class StreamingSource(Source):
    """An endless stream of samples from shards read front to back.

    Args:
        shards: Paths or URLs.
        spec: Fields of the samples.
        shuffle_buffer: Samples among which each next one is drawn.
        sample_bytes: Size of the tensors of a sample.
    """

    num_samples = None

    def __init__(
        self, shards: list[str], spec: SampleSpec, shuffle_buffer: int, sample_bytes: int = 0
    ) -> None:
        self.shards, self.sample_bytes = shards, sample_bytes
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
        batch_bytes = batch_size * self.sample_bytes
        check_shared_memory("data.num_workers", num_workers, batch_bytes, process.per_node)
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
    def load_state_dict(self, state: dict[str, Any], position: int, new_phase: bool = False) -> None:
        self.turn = int(state["turn"])


class _Stream(IterableDataset[Sample]):
    """The pipeline of one process, split over its workers."""

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
        num = len(self.shards)
        begun, skipped = divmod(first, num)
        for epoch in count(begun):
            order = permutation(num, self.spec.seed, epoch)  # once: a turn costs the same among many shards
            for within in range(skipped if epoch == begun else 0, num):
                yield {"url": self.shards[order[within]], "turn": epoch * num + within}


def _plain(train: Train) -> Patterns:
    """Return the shards of a single set of which all samples are used: others need an index."""
    sets = named_sets(train)
    if "" not in sets:
        raise ValueError("data.train: Streaming reads no mixture of sets, expected one list, or Indexed")
    if sets[""].filter is not None:
        raise ValueError("data.filter: Streaming has no index to filter in, expected Indexed")
    return sets[""].shards


def _shards(patterns: str | Sequence[str]) -> list[str]:
    found: list[str] = []
    for url in urls(patterns, "data.train"):
        found += [url] if "://" in url else expand(url, "data.train")
    return found


def _samples(turns: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield raw samples, whitelisted members only, with the "turn" of their shard.

    A shard whose connection breaks is opened again, after a while, and read on where it broke.
    """
    for turn in turns:
        done, waits = 0, list(WAITS)
        while True:
            begun = done
            try:
                for sample in islice(_read(turn["url"]), done, None):
                    done += 1
                    yield {**sample, "turn": turn["turn"]}
                break
            except Exception as error:  # webdataset and its openers raise anything
                waits = list(WAITS) if done > begun else waits
                if not waits or not _is_connection(turn["url"], error):
                    raise _failure(turn["url"], error) from error
                time.sleep(waits.pop(0))


def _read(url: str) -> Iterator[dict[str, Any]]:
    """Yield the raw samples of a shard, the last one once all of it has come."""
    stream = wds.gopen(url)
    try:
        last: dict[str, Any] | None = None
        for key, members in read_samples(stream, url):
            if last is not None:
                yield last
            last = {"__key__": key, "__url__": url, **members}
        while stream.read(1 << 20):
            pass
        stream.close()  # waits for the program that reads a URL: a tar cut between two members is no error
    except Exception:
        stream.close()  # what that program says of itself is the better reason
        raise
    finally:
        with suppress(Exception):
            stream.close()
    if last is not None:
        yield last


def _is_connection(url: str, error: Exception) -> bool:
    """Whether a connection broke, in contrast to a local file, a missing program or a page that is no tar."""
    is_remote = "://" in url and not url.startswith("file:")
    is_final = isinstance(error, FileNotFoundError | NotATar) or "exit 22 " in str(error)
    return is_remote and not is_final


def _failure(url: str, error: Exception) -> Exception:
    """Make one line of an error."""
    text = str(error.args[0] if error.args and not isinstance(error, FileNotFoundError) else error)
    code = re.search(r"\[+'(\w+)'.*exit (\d+) ", text, re.DOTALL)
    reason = f"{code[1]} ended with code {code[2]}" if code else " ".join(text.split())
    if _is_connection(url, error):
        return Unreachable(
            f"{url}: the connection broke {len(WAITS) + 1} times ({reason:.80}): try again later"
        )
    return ValueError(f"{url}: cannot be read as a tar ({reason:.100})")


def _decoded(raw: Iterable[dict[str, Any]], spec: SampleSpec) -> Iterator[Sample]:
    """Decode; a bad sample is dropped, and the next one reports it."""
    skipped: list[Skipped] = []
    for members in raw:
        try:
            sample = _decode(members, spec)
        except BadSample as error:
            skipped.append(Skipped(error.reason, str(error)))
            if len(skipped) >= MAX_BAD:
                raise ValueError(
                    f"{MAX_BAD} samples in a row cannot be used, the last one: {error}"
                ) from error
            continue
        yield {**sample, "skipped": skipped} if skipped else sample
        skipped = []


def _decode(raw: dict[str, Any], spec: SampleSpec) -> Sample:
    sample = SampleId(raw["__url__"], raw["__key__"])
    members = {name: raw[name] for name in whitelist(spec.fields) if name in raw}
    # the key, not a counter, draws: a counter would depend on the worker
    view = spec.view(raw["turn"], int.from_bytes(sample.key.encode()[-8:], "big"))
    decoded = decode_sample(members, sample, spec.fields, view, classes=spec.classes)
    return {**decoded, "turn": raw["turn"], "shard": sample.shard}


def _collate(samples: Sequence[Sample]) -> Any:
    shards: dict[str, list[str]] = {}
    distinct: list[Sample] = []
    for sample in samples:  # equal keys, of shards that count anew each, would draw equal noise
        key, shard = sample["key"], sample["shard"]
        of_key = shards.setdefault(key, [])
        of_key += [shard] if shard not in of_key else []
        key += f"@{of_key.index(shard)}" if of_key[0] != shard else ""
        distinct.append({**{k: v for k, v in sample.items() if k != "shard"}, "key": key})
    batch: Any = collate(distinct)
    batch["turn"] = max(batch["turn"])
    return batch
