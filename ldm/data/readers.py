"""Readers: how training shards become an endless stream. Validation is read the same way under each."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from ldm.data.decode import BadSample
from ldm.data.fields import FIELDS, UNKNOWN_CLASS, Sample
from ldm.data.files import ShardFiles, usable
from ldm.data.index import fingerprint
from ldm.data.order import Order
from ldm.data.source import (
    MAX_BAD,
    DataRank,
    EvaluationSet,
    SampleSpec,
    Source,
    first_usable,
    make_loader,
    rank_batches,
)
from ldm.data.stored import check_fields, check_flipped, num_giving
from ldm.data.table import summarize_shared
from ldm.data.tar import expand
from ldm.data.view import View

NUM_CHECKED, MAX_UNKNOWN = 100, 0.05
"""Training samples whose classes are looked at before the first step, and the share of them that may be
unknown: single ones are mistakes of the data, many of the configuration."""


class Reader(ABC):
    """Opens shards for training and validation.

    Args:
        index_dir: Folder for the indices of the shards; None writes each next to its shard.
    """

    def __init__(self, index_dir: str | None = None) -> None:
        self.index_dir = index_dir

    @abstractmethod
    def open(self, patterns: str | Sequence[str], spec: SampleSpec) -> Source:
        """Open training shards.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken or lack one of the fields.
        """

    def prepare(self, train: str | Sequence[str], val: str | Sequence[str]) -> None:
        """Do once what is costly: here, index the validation shards."""
        self.files(val, "data.val")

    def files(self, patterns: str | Sequence[str], option: str) -> ShardFiles:
        """Index the shards that ``option`` names and give random access to those with samples."""
        summaries = summarize_shared(expand(patterns, option), self.index_dir)
        return ShardFiles(usable(summaries, option), self.index_dir)

    def evaluation(
        self,
        patterns: str | Sequence[str],
        image_size: int,
        option: str = "data.val",
        reads: Callable[[Collection[str]], Collection[str]] = lambda stored: (),
        optional: Collection[str] | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> EvaluationSet:
        """Open shards for evaluation, and check each for usable samples.

        Args:
            patterns: The shards.
            image_size: Side of the images in pixels.
            option: What names the shards, for messages.
            reads: Gives the fields that are read with the image, see ``ldm.types.ReadsFields``.
            optional: Further fields, loaded where all shards have them and a sample's can be read; None: all.
            classes: Number of classes of fields that hold some: samples with others are bad ones.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken, lack the image or what is read, or hold none that can be used.
        """
        files = self.files(patterns, option)
        found = [
            name
            for name in FIELDS
            if all(num_giving(files, n, name) == s.count for n, s in enumerate(files.summaries))
        ]
        read = {"image", *reads(("latent",) if "latent" in found else ())}
        required = [name for name in FIELDS if name in read]
        check_fields(files, required, option)
        wanted = [name for name in found if optional is None or name in optional]
        rest = [name for name in wanted if name not in read and not FIELDS[name].is_implied]
        samples = EvaluationSet(files, required, image_size, rest, classes)
        samples.check(option)
        return samples


class Indexed(Reader):
    """Reads local shards through a sidecar index: exact order, exact resume, at any number of processes.

    Args:
        group_shards: Shards that are permuted jointly. More mix better, fewer read more sequentially.
        index_dir: Folder for the indices of the shards; None writes each next to its shard.
    """

    def __init__(self, group_shards: int = 8, index_dir: str | None = None) -> None:
        super().__init__(index_dir)
        if group_shards < 1:
            raise ValueError(f"data.reader.init_args.group_shards: got {group_shards}, expected at least 1")
        self.group_shards = group_shards

    @override
    def prepare(self, train: str | Sequence[str], val: str | Sequence[str]) -> None:
        self.files(train, "data.train")
        super().prepare(train, val)

    @override
    def open(self, patterns: str | Sequence[str], spec: SampleSpec) -> IndexedSource:
        files = self.files(patterns, "data.train")
        check_fields(files, spec.fields, "data.fields")
        check_flipped(files, spec.fields, spec.augment.flip)
        return IndexedSource(files, spec, self.group_shards)


class IndexedSource(Source, Dataset[Sample]):
    """Training samples by their global position, without end.

    Args:
        files: The shards.
        spec: Fields of the samples.
        group_shards: Shards that are permuted jointly.
    """

    def __init__(self, files: ShardFiles, spec: SampleSpec, group_shards: int) -> None:
        self.files = files
        self.spec = spec
        self.order = Order([summary.count for summary in files.summaries], spec.seed, group_shards)
        self.num_samples = len(self.order)

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a global position.

        A bad sample never shifts a position: it is replaced by the next position's sample, with what is drawn
        for ``position``.

        Raises:
            ValueError: If ``MAX_BAD`` samples in a row cannot be used.
        """
        view = self.spec.view(position)
        return first_usable(lambda tried: self._read(tried, view), range(position, position + MAX_BAD))

    def _read(self, position: int, view: View) -> Sample:
        shard, row = self.order.locate(position)
        return self.files.sample(shard, row, self.spec.fields, view, classes=self.spec.classes)

    @override
    def check(self) -> None:
        classes = self.spec.classes
        found: list[BadSample] = []
        checked = range(min(NUM_CHECKED, len(self.order)) if classes else 0)
        for position in checked:
            shard, row = self.order.locate(position)
            try:
                self.files.sample(shard, row, [*classes], self.spec.view(position), classes=classes)
            except BadSample as error:
                found += [error] if error.reason == UNKNOWN_CLASS else []
        if len(found) > max(1, MAX_UNKNOWN * len(checked)):
            what = f"{len(found)} of the first {len(checked)} samples have classes that the model lacks"
            raise ValueError(f"data.train: {what}, e.g. {found[0]}")

    @override
    def captions(self, num: int, seconds: float) -> list[str]:
        found: list[str] = []
        end = time.monotonic() + seconds
        for position in range(min(num, len(self.order))):
            if time.monotonic() > end:
                break
            with suppress(BadSample):
                shard, row = self.order.locate(position)
                found.append(self.files.sample(shard, row, ["text"], self.spec.view(position))["text"])
        return found

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "reader": f"Indexed(group_shards={self.order.group_shards})",
            "shards": len(self.files.summaries),
            "samples": self.num_samples,
            "fingerprint": fingerprint(self.files.summaries),
        }

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
