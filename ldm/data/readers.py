"""Readers: how training shards become an endless stream. Validation is read the same way under each."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from ldm.data.bucket_order import BucketOrder
from ldm.data.bucket_rows import Shapes
from ldm.data.buckets import Size
from ldm.data.cache import DEFAULT, ShardCache
from ldm.data.decode import BadSample
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.fields import FIELDS, STORED, Sample
from ldm.data.files import ShardFiles, usable
from ldm.data.filters import Filter
from ldm.data.kept import kept_rows
from ldm.data.mixture import Mixture
from ldm.data.order import mix
from ldm.data.own_members import own_members
from ldm.data.rows import Rows
from ldm.data.sets import IndexedSet, Patterns, TrainSet, TrainSets, filter_of, named_sets, option_of
from ldm.data.shard_file import peeking
from ldm.data.source import (
    MAX_BAD,
    DataRank,
    SampleSpec,
    Source,
    first_usable,
    make_loader,
    rank_batches,
)
from ldm.data.stacking import NO_SLOTS, Slots, read_batch
from ldm.data.stored import check_captions, check_fields, check_flipped, num_giving
from ldm.data.table import summarize_shared
from ldm.data.tar import expand
from ldm.types import RGB8, ImageKind

Train = Patterns | TrainSets


class Reader(ABC):
    """Opens shards for training and validation.

    Args:
        index_dir: Folder for the indices of the shards; None writes each next to its shard, and those of
            remote shards into the cache.
        cache: Where remote shards are staged.
    """

    def __init__(self, index_dir: str | None = None, cache: ShardCache = DEFAULT) -> None:
        self.index_dir, self.cache = index_dir, cache

    @abstractmethod
    def open(self, train: Train, spec: SampleSpec) -> Source:
        """Open training shards.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken or lack one of the fields.
        """

    def prepare(self, train: Train, val: Patterns, val_filter: Filter | None = None) -> None:
        """Do once what is costly: here, index the validation shards."""
        self.kept(self.files(val, "data.val"), val_filter)

    def files(self, patterns: Patterns, option: str) -> ShardFiles:
        """Index the shards that ``option`` names and give random access to those with samples."""
        summaries = summarize_shared(expand(patterns, option), self.index_dir, self.cache)
        return ShardFiles(usable(summaries, option), self.index_dir, self.cache)

    def kept(self, files: ShardFiles, kept: Filter | None) -> tuple[ShardFiles, Rows]:
        """Apply a filter: the shards of which it keeps samples, and their rows that are kept.

        Args:
            files: The shards.
            kept: The filter; None keeps all.

        Raises:
            ValueError: If it keeps nothing, or names a field that no sample has.
        """
        rows = kept_rows(files.summaries, self.index_dir, kept, self.cache)
        return ShardFiles(rows.summaries, self.index_dir, self.cache), rows

    def evaluation(
        self,
        patterns: Patterns,
        image_size: int,
        option: str = "data.val",
        reads: Callable[[Collection[str]], Collection[str]] = lambda stored: (),
        optional: Collection[str] | None = None,
        classes: Mapping[str, int] | None = None,
        kept: Filter | None = None,
        kind: ImageKind = RGB8,
    ) -> EvaluationSet:
        """Open shards for evaluation, and check each for usable samples.

        Args:
            patterns: The shards.
            image_size: Side of the images in pixels.
            option: What names the shards, for messages.
            reads: Gives the fields that are read with the image, see ``ldm.stage_protocols.ReadsFields``.
            optional: Further fields, loaded where all shards have them and a sample's can be read; None: all.
            classes: Number of classes of fields that hold some: samples with others are bad ones.
            kept: Filter of the samples; None keeps all.
            kind: Channels and bits of the images.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken, lack the image or what is read, or hold none that can be used.
        """
        files, rows = self.kept(self.files(patterns, option), kept)
        found = [
            name
            for name in FIELDS
            if all(num_giving(files, n, name) == s.count for n, s in enumerate(files.summaries))
        ]
        read = {"image", *reads(tuple(name for name in STORED if name in found))}
        required = [name for name in FIELDS if name in read]
        check_fields(files, required, option, rows)
        wanted = [name for name in found if optional is None or name in optional]
        rest = [name for name in wanted if name not in read and not FIELDS[name].is_implied]
        samples = EvaluationSet(files, required, image_size, rest, classes, rows, kind)
        samples.check(option)
        return samples


class Indexed(Reader):
    """Reads shards through a sidecar index: exact order, exact resume, at any number of processes.

    Remote shards (s3, gs, hf, http, https and other URLs of fsspec) are staged, whole, in a folder that all
    processes of a node share. Two groups of shards, of each set, should fit into it.

    Args:
        group_shards: Shards that are permuted jointly. More mix better, fewer read more sequentially.
        index_dir: Folder for the indices of the shards; None writes each next to its shard, and those of
            remote shards into ``cache_dir``.
        cache_dir: Folder for staged shards, on a disk of each node; None takes ``LDM_CACHE`` from the
            environment, or ``~/.cache/ldm/shards``.
        cache_gb: Bound of the size of the staged shards in 10^9 bytes; None takes ``LDM_CACHE_GB`` from the
            environment, or 50. Those least recently used are deleted first.
    """

    def __init__(
        self,
        group_shards: int = 8,
        index_dir: str | None = None,
        cache_dir: str | None = None,
        cache_gb: float | None = None,
    ) -> None:
        super().__init__(index_dir, ShardCache(cache_dir, cache_gb))
        if group_shards < 1:
            raise ValueError(f"data.reader.init_args.group_shards: got {group_shards}, expected at least 1")
        self.group_shards = group_shards

    @override
    def prepare(self, train: Train, val: Patterns, val_filter: Filter | None = None) -> None:
        for name, of in named_sets(train).items():
            self.kept(self.files(of.shards, option_of(name)), filter_of(name, of))
        super().prepare(train, val, val_filter)

    @override
    def open(self, train: Train, spec: SampleSpec) -> IndexedSource:
        named = named_sets(train)
        sets = {name: self._open_set(name, of, spec) for name, of in named.items()}
        for each in sets.values():
            each.files.share = 1 / len(sets)
        mixture = Mixture({name: of.weight for name, of in named.items()}, spec.seed)
        return IndexedSource(sets, mixture, spec)

    def _open_set(self, name: str, of: TrainSet, spec: SampleSpec) -> IndexedSet:
        option = option_of(name)
        own = {f"{option}.caption": of.caption, f"{option}.caption_key": of.caption_key}
        check_captions(spec.fields, {"data.augment.captions": spec.augment.captions, **own})
        files = self.files(of.shards, option)
        kept = filter_of(name, of)
        shapes = spec.buckets or Shapes((Size(spec.image_size, spec.image_size),))
        samples = shapes.rows(files.summaries, self.index_dir, kept, self.cache)
        files = own_members(ShardFiles(samples.rows.summaries, self.index_dir, self.cache), of)
        more = {} if of.has_captions else {"text": tuple(spec.augment.captions or ())}
        check_fields(
            files, spec.fields, f"{option}: data.fields" if name else "data.fields", samples.rows, more
        )
        check_flipped(files, spec.fields, spec.augment.flip)
        seed = mix(spec.seed, *name.encode()) if name else spec.seed
        order = BucketOrder(samples.rows.counts, seed, self.group_shards, shapes.batch_size)
        return IndexedSet(name, files, samples, order)


class IndexedSource(Source, Dataset[Sample]):
    """Training samples by their global position, without end.

    Args:
        sets: Where they come from, by name.
        mixture: In which order the sets take turns.
        spec: Fields of the samples.
    """

    def __init__(self, sets: dict[str, IndexedSet], mixture: Mixture, spec: SampleSpec) -> None:
        self.sets, self.mixture, self.spec, self.shapes = sets, mixture, spec, spec.buckets
        self.unit = 1 if spec.buckets is None else spec.buckets.batch_size
        """Samples in a row that come from one set: those of a global batch, where it has one size."""
        self.num_samples = sum(len(each.order) for each in sets.values())

    def __getitem__(self, position: int, slots: Slots = NO_SLOTS) -> Sample:
        """Return the sample at a global position.

        A bad sample never shifts a position: it is replaced by the next one of its set and size, with what is
        drawn for ``position``.

        Args:
            position: The position.
            slots: Memory that its values may be decoded into.

        Raises:
            ValueError: If ``MAX_BAD`` samples in a row cannot be used.
        """
        of, place = self._locate(position)
        view = self.spec.view(position, size=of.size(place))
        read = partial(of.read, place, self.spec, view, slots=slots)
        return first_usable(lambda ahead: read(ahead=ahead), range(MAX_BAD))

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """Return the samples of a batch, see ``__getitem__``."""
        return read_batch(self.__getitem__, positions)

    def _locate(self, position: int) -> tuple[IndexedSet, int]:
        """Return the set at a global position, and the position in it."""
        turn, within = divmod(position, self.unit)
        name, number = self.mixture.locate(turn)
        return self.sets[name], number * self.unit + within

    @override
    def check(self) -> None:
        with peeking():
            for each in self.sets.values():
                each.check(self.spec)

    @override
    def report(self) -> list[str]:
        return [line for each in self.sets.values() for line in each.report()]

    @override
    def counts(self, position: int) -> dict[str, int]:
        found = self.mixture.counts(position // self.unit)
        return {name: self.unit * count for name, count in found.items() if name}

    @override
    def captions(self, num: int, seconds: float) -> list[str]:
        found: list[str] = []
        end = time.monotonic() + seconds
        for position in range(min(num, self.num_samples or num)):
            if time.monotonic() > end:
                break
            with suppress(BadSample):
                of, place = self._locate(position)
                found.append(of.read(place, self.spec, self.spec.view(position), ["text"])["text"])
        return found

    @override
    def identity(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for each in self.sets.values():
            found |= {"reader": f"Indexed(group_shards={each.order.group_shards})", **each.identity()}
        return found

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"phases": self.mixture.state_dict()} if "" not in self.sets else {}

    @override
    def load_state_dict(self, state: dict[str, Any], position: int, new_phase: bool = False) -> None:
        if "phases" in state:
            self.mixture.resume(state["phases"], position // self.unit, new_phase)

    @override
    def loader(
        self, position: Callable[[], int], batch_size: int, num_workers: int, process: DataRank
    ) -> DataLoader[Sample]:
        return make_loader(self, _Batches(position, batch_size, process), batch_size, num_workers, process)


class _Batches(Sampler[list[int]]):
    """Yields the positions of this rank's batches, from wherever training stands when it is iterated."""

    def __init__(self, position: Callable[[], int], batch_size: int, process: DataRank) -> None:
        self.position = position
        self.batch_size = batch_size
        self.process = process

    def __iter__(self) -> Iterator[list[int]]:
        return rank_batches(self.position(), self.batch_size, self.process)
