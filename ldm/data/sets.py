"""Sets of training shards, as a configuration names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.data.bucket_order import BucketOrder
from ldm.data.bucket_rows import BucketRows
from ldm.data.buckets import AspectRatio, Size
from ldm.data.decode import BadSample
from ldm.data.fields import UNKNOWN_CLASS, Sample
from ldm.data.files import ShardFiles
from ldm.data.filters import Filter
from ldm.data.index import fingerprint
from ldm.data.kept import describe
from ldm.data.source import SampleSpec
from ldm.data.stacking import NO_SLOTS, Slots
from ldm.data.view import View

NUM_CHECKED, MAX_UNKNOWN = 100, 0.05
"""Training samples whose classes are looked at before the first step, and the share of them that may be
unknown: single ones are mistakes of the data, many of the configuration."""
Patterns = str | Sequence[str]
"""Paths of shards with braces or globs."""


@dataclass(frozen=True)
class TrainSet:
    """A set of training shards, one of several in ``data.train``.

    Args:
        shards: The shards: paths with braces or globs, one or a list.
        weight: Share of this set in the samples, relative to the other weights; 0 leaves it out.
        filter: Expression that is true for the samples that are used, in addition to ``data.filter``; None
            uses all.
        caption_key: Key of the samples' json that holds the caption, or a list of captions; None reads them
            from where they are otherwise (data/README.md).
        caption: Caption of all samples of this set; None reads theirs.
        label: Class of all samples of this set; None reads theirs.
    """

    shards: str | list[str]
    weight: float = 1.0
    filter: str | None = None
    caption_key: str | None = None
    caption: str | None = None
    label: int | None = None

    @property
    def has_captions(self) -> bool:
        """Whether its captions are stated here."""
        return self.caption is not None or self.caption_key is not None


TrainSets = Mapping[str, TrainSet]
"""Sets by their names; one without a name is called ""."""


def named_sets(train: Patterns | TrainSets, kept: str | None = None) -> dict[str, TrainSet]:
    """Return sets by their names.

    Args:
        train: Shards, or several sets.
        kept: Filter of all; None keeps all.

    Raises:
        ValueError: If there is no set, or a set or its name is none.
    """
    if not isinstance(train, Mapping):
        return {"": TrainSet(train if isinstance(train, str) else list(train), filter=kept)}
    if not train:
        raise ValueError("data.train: got no set, expected at least one")
    for name, of in train.items():
        _check(name, of, is_only=len(train) == 1)
    return {name: replace(of, filter=_both(kept, of.filter)) for name, of in train.items()}


def _check(name: str, of: TrainSet, is_only: bool) -> None:
    if not (re.fullmatch(r"[A-Za-z0-9_-]+", name) or (is_only and not name)):
        raise ValueError(f"data.train: a set is called '{name:.40}', expected letters, digits, '_' and '-'")
    if of.caption_key is not None and of.caption is not None:
        raise ValueError(f"data.train.{name}: got caption and caption_key, expected one of them")
    if of.caption is not None and not of.caption.strip():
        raise ValueError(f"data.train.{name}.caption: got an empty caption, expected text")
    if of.label is not None and of.label < 0:
        raise ValueError(f"data.train.{name}.label: got {of.label}, expected a class >= 0")
    if of.filter and of.caption_key is not None and "caption_length" in of.filter:
        raise ValueError(
            f"data.train.{name}.filter: caption_length is that of other captions than {of.caption_key}, "
            f"expected len({of.caption_key})"
        )


def _both(*filters: str | None) -> str | None:
    found = [text for text in filters if text is not None]
    return " and ".join(f"({text})" for text in found) if len(found) > 1 else next(iter(found), None)


def option_of(name: str) -> str:
    """Return the option that names the shards of a set."""
    return f"data.train.{name}" if name else "data.train"


def filter_option(name: str) -> str:
    """Return the option that names the filter of a set."""
    return f"data.train.{name}.filter" if name else "data.filter"


def filter_of(name: str, of: TrainSet) -> Filter | None:
    """Return the filter of a set; None if all of its samples are used.

    Raises:
        ValueError: If its text is no filter.
    """
    return None if of.filter is None else Filter(of.filter, filter_option(name))


class IndexedSet:
    """The samples of a set by their position in it, without end.

    Args:
        name: Of the set; "" for one that has none.
        files: Its shards.
        samples: Which of their rows are used, and in which size.
        order: Order of these.
    """

    def __init__(self, name: str, files: ShardFiles, samples: BucketRows, order: BucketOrder) -> None:
        self.name, self.files, self.samples, self.order = name, files, samples, order

    @property
    def option(self) -> str:
        """What names it, for messages."""
        return option_of(self.name)

    def size(self, position: int) -> Size:
        """Return height and width of the image at a position in the set."""
        return self.samples.sizes[self.order.bucket(position)]

    def read(
        self,
        position: int,
        spec: SampleSpec,
        view: View,
        fields: Sequence[str] | None = None,
        ahead: int = 0,
        slots: Slots = NO_SLOTS,
    ) -> Sample:
        """Read a sample; its key begins with the name of the set.

        Args:
            position: Position in the set.
            spec: What is read.
            view: What of it is shown.
            fields: Names of fields; None: those of ``spec``.
            ahead: Samples of the same size to pass over: those that cannot be used.
            slots: Memory that its values may be decoded into.

        Raises:
            BadSample: If it cannot be used.
        """
        shard, bucket, k = self.order.locate(position, ahead)
        self.files.prefetch(shard, lambda: self.order.upcoming(position))
        row, names = self.samples.rows.row(shard, bucket, k), spec.fields if fields is None else fields
        sample = self.files.sample(shard, row, names, view, classes=spec.classes, slots=slots)
        return {**sample, "key": f"{self.name}/{sample['key']}"} if self.name else sample

    def check(self, spec: SampleSpec) -> None:
        """Look before the first step whether the model has the classes of the first samples.

        Raises:
            ValueError: If too many have others.
        """
        found: list[BadSample] = []
        checked = range(min(NUM_CHECKED, len(self.order)) if spec.classes else 0)
        for position in checked:
            try:
                self.read(position, spec, spec.view(position, size=self.size(position)), [*spec.classes])
            except BadSample as error:
                found += [error] if error.reason == UNKNOWN_CLASS else []
        if len(found) > max(1, MAX_UNKNOWN * len(checked)):
            what = f"{len(found)} of the first {len(checked)} samples have classes that the model lacks"
            raise ValueError(f"{self.option}: {what}, e.g. {found[0]}")

    def report(self) -> list[str]:
        """Say which samples a filter keeps, and how many there are of each size where there are several."""
        lines = [] if self._filter is None else [f"{filter_option(self.name)} {describe(self.samples.rows)}"]
        return lines + self.samples.lines()

    def identity(self) -> dict[str, Any]:
        """Return what its order depends on in addition to the seed."""
        sizes = self.samples.sizes
        found = {
            "filter": self._filter,
            "buckets": " ".join(map(str, sizes)) if len(sizes) > 1 else None,
            "data.batch_size x processes": self.order.batch_size if len(sizes) > 1 else None,
            "shards": len(self.files.summaries),
            "samples": len(self.order),
            "fingerprint": fingerprint(self.files.summaries),
        }
        return {f"{self.name}.{name}" if self.name else name: value for name, value in found.items()}

    @property
    def _filter(self) -> str | None:
        """The filter's expression; None without one."""
        grouping = self.samples.rows.grouping
        kept = grouping.kept if isinstance(grouping, AspectRatio) else grouping
        return None if kept is None else kept.identity
