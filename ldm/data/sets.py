"""Sets of training shards, as a configuration names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.data.decode import BadSample
from ldm.data.fields import UNKNOWN_CLASS, Sample
from ldm.data.files import ShardFiles
from ldm.data.index import fingerprint
from ldm.data.kept import describe
from ldm.data.order import Order
from ldm.data.rows import Rows
from ldm.data.source import SampleSpec
from ldm.data.view import View

NUM_CHECKED, MAX_UNKNOWN = 100, 0.05
"""Training samples whose classes are looked at before the first step, and the share of them that may be
unknown: single ones are mistakes of the data, many of the configuration."""
Patterns = str | Sequence[str]
"""Paths of shards with braces or globs."""


@dataclass(frozen=True)
class TrainSet:
    """A set of training shards.

    Args:
        shards: The shards: paths with braces or globs, one or a list.
        filter: Expression that is true for the samples that are used; None uses all (data/README.md).
    """

    shards: Patterns
    filter: str | None = None


def named_sets(train: Patterns | Mapping[str, TrainSet]) -> dict[str, TrainSet]:
    """Return sets by their names; one without a name is called ""."""
    if isinstance(train, Mapping):
        return dict(train)
    return {"": TrainSet(train if isinstance(train, str) else list(train))}


def option_of(name: str) -> str:
    """Return the option that names the shards of a set."""
    return f"data.train.{name}" if name else "data.train"


def filter_option(name: str) -> str:
    """Return the option that names the filter of a set."""
    return f"data.train.{name}.filter" if name else "data.filter"


class IndexedSet:
    """The samples of a set by their position in it, without end.

    Args:
        name: Of the set; "" for one that has none.
        files: Its shards.
        rows: Which of their rows are used.
        order: Order of these.
    """

    def __init__(self, name: str, files: ShardFiles, rows: Rows, order: Order) -> None:
        self.name, self.files, self.rows, self.order = name, files, rows, order

    @property
    def option(self) -> str:
        """What names it, for messages."""
        return option_of(self.name)

    def read(
        self, position: int, spec: SampleSpec, view: View, fields: Sequence[str] | None = None
    ) -> Sample:
        """Read a sample.

        Args:
            position: Position in the set.
            spec: What is read.
            view: What of it is shown.
            fields: Names of fields; None: those of ``spec``.

        Raises:
            BadSample: If it cannot be used.
        """
        shard, k = self.order.locate(position)
        self.files.prefetch(shard, lambda: self.order.upcoming(position))
        row, names = self.rows.row(shard, 0, k), spec.fields if fields is None else fields
        return self.files.sample(shard, row, names, view, classes=spec.classes)

    def check(self, spec: SampleSpec) -> None:
        """Look before the first step whether the model has the classes of the first samples.

        Raises:
            ValueError: If too many have others.
        """
        found: list[BadSample] = []
        checked = range(min(NUM_CHECKED, len(self.order)) if spec.classes else 0)
        for position in checked:
            try:
                self.read(position, spec, spec.view(position), [*spec.classes])
            except BadSample as error:
                found += [error] if error.reason == UNKNOWN_CLASS else []
        if len(found) > max(1, MAX_UNKNOWN * len(checked)):
            what = f"{len(found)} of the first {len(checked)} samples have classes that the model lacks"
            raise ValueError(f"{self.option}: {what}, e.g. {found[0]}")

    def report(self) -> str | None:
        """Say which samples are used, where there is a filter."""
        kept = self.rows.grouping
        return None if kept is None else f"{filter_option(self.name)} {describe(self.rows)}"

    def identity(self) -> dict[str, Any]:
        """Return what its order depends on in addition to the seed."""
        kept = self.rows.grouping
        return {
            "filter": None if kept is None else kept.identity,
            "shards": len(self.files.summaries),
            "samples": len(self.order),
            "fingerprint": fingerprint(self.files.summaries),
        }
