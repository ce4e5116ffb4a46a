"""What the readers have in common: where samples come from, and how they become batches."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.decode import FIELDS, MEMBERS, Sample, json_fields
from ldm.data.files import ShardFiles
from ldm.data.index import Summary, fingerprint
from ldm.data.order import mix
from ldm.types import Batch

MAX_BAD = 100
"""Samples that cannot be used in a row, after which training stops."""


@dataclass(frozen=True)
class Spec:
    """What samples must hold.

    Args:
        fields: Any of ``FIELDS``.
        image_size: Side of the images in pixels.
        seed: Seed of the order and of the choice of captions.
    """

    fields: tuple[str, ...]
    image_size: int
    seed: int

    def draw(self, *position: int) -> int:
        """Return 63 random bits for the sample at ``position``: a function of (seed, position) alone."""
        return mix(self.seed, 0xD4A3, *position) >> 1


@dataclass(frozen=True)
class DataRank:
    """Which process this is.

    Args:
        rank: Number of this process.
        world: Number of processes.
    """

    rank: int
    world: int


class Source(ABC):
    """An endless stream of training batches that can be continued."""

    num_samples: int | None
    """Samples of an epoch; None if it is not known."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Say what the order depends on beside the seed: primitives, compared on resume."""

    @abstractmethod
    def loader(
        self, position: Callable[[], int], batch_size: int, num_workers: int, process: DataRank
    ) -> DataLoader[Sample]:
        """Make a loader without end.

        Args:
            position: Gives the global number of samples processed; asked whenever an iteration begins.
            batch_size: Samples per batch and process.
            num_workers: Worker processes.
            process: Which process this is.
        """

    def observe(self, batch: dict[str, Any]) -> None:
        """Take from a batch what the source must know to continue; called in the main process."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs beside the number of samples."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after ``state``."""
        return None


class EvaluationSet(Dataset[Sample]):
    """Samples in the order of their shards, each once. A bad sample is an error.

    Args:
        files: The shards.
        spec: What the samples must hold; captions are the canonical ones.
    """

    def __init__(self, files: ShardFiles, spec: Spec) -> None:
        self.files = files
        self.spec = spec
        self.ends = np.cumsum([summary.count for summary in files.summaries])

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self.ends[-1])

    def fingerprint(self, num: int) -> str:
        """Hash which images the first ``num`` are: shards by name, size and count, and the images' side.

        The same wherever the shards lie.
        """
        what = [fingerprint(self.files.summaries), self.spec.image_size, min(num, len(self))]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def identity(self, num: int) -> str:
        """Return text that changes when the first ``num`` images do, or when shards are written anew."""
        return f"{self.fingerprint(num)} {[summary.mtime_ns for summary in self.files.summaries]}"

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a position in [0, len)."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        row = position - int(self.ends[shard] - self.files.summaries[shard].count)
        return self.files.sample(shard, row, self.spec.fields, self.spec.image_size, draw=None)

    def loader(self, batch_size: int, num_workers: int, process: DataRank) -> DataLoader[Sample]:
        """Make the loader of one process.

        Rank r of w reads positions r, r + w, ...: each sample once over all ranks, no padding. All ranks get
        the same number of batches (of sizes that differ by one at most, so up to batch_size + 1), because a
        model under DDP synchronises its buffers on every forward pass.
        """
        positions = np.arange(process.rank, len(self), process.world)
        num_batches = max(1, -(-(len(self) // process.world) // batch_size))
        batches = [part.tolist() for part in np.array_split(positions, num_batches)]
        return make_loader(self, batches, num_workers, persistent=True)


def make_loader(
    dataset: Dataset[Sample], batches: Any, num_workers: int, persistent: bool = False
) -> DataLoader[Sample]:
    """Make a loader over lists of positions that ``batches`` yields."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and num_workers > 0,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack tensors and labels, list keys, captions and layouts.

    Raises:
        ValueError: If tensors of a field differ in shape.
    """
    rows = cast(Sequence[dict[str, Any]], samples)
    batch: dict[str, Any] = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows if name in row]
        if isinstance(first, torch.Tensor) and name != "layout":
            batch[name] = _stack(name, values, [row["key"] for row in rows])
        elif name == "label":
            batch[name] = torch.tensor(values, dtype=torch.int64)
        elif name != "skipped":
            batch[name] = values
    skipped = [message for row in rows for message in row.get("skipped", ())]
    if skipped:
        batch["skipped"] = skipped
    return cast(Batch, batch)


def _stack(name: str, values: list[torch.Tensor], keys: list[str]) -> torch.Tensor:
    odd = next((i for i, value in enumerate(values) if value.shape != values[0].shape), None)
    if odd is not None:
        one, other = tuple(values[0].shape), tuple(values[odd].shape)
        raise ValueError(f"samples '{keys[0]}' and '{keys[odd]}' have {name}s of shapes {one} and {other}")
    return torch.stack(values)


def fields_of(files: ShardFiles, shard: int, asked: Iterable[str] = FIELDS) -> set[str]:
    """Return those of ``asked`` that a shard gives: all of its samples must have a member for it.

    Where only json members could give one, the first sample is looked into.
    """
    summary = files.summaries[shard]
    found: set[str] = {field for field in FIELDS if _num_plain(summary, field) >= summary.count}
    open_questions = {field for field in asked if "json" in MEMBERS[field]} - found
    if open_questions and summary.present["json"] == summary.count:
        found |= json_fields(*files.members(shard, 0, ("json",)))
    return found & set(asked)


def _num_plain(summary: Summary, field: str) -> int:
    return sum(summary.present[name] for name in MEMBERS[field] if name != "json")


def check_fields(files: ShardFiles, fields: Sequence[str], name: str) -> None:
    """Raise ValueError, naming the config key ``name``, if a shard lacks one of ``fields``."""
    for shard, summary in enumerate(files.summaries):
        found = fields_of(files, shard, fields)
        lacking = [field for field in fields if field not in found]
        if lacking:
            has = _describe(summary)
            raise ValueError(f"{name}: asks for {lacking}, but the shard {summary.path} has {has}")


def _describe(summary: Summary) -> str:
    found = [f"{name} ({count})" for name, count in summary.present.items() if count]
    return f"{summary.count} samples with members {', '.join(found)}"


def forever(start: int, batch_size: int, process: DataRank) -> Iterator[list[int]]:
    """Yield the global positions of a rank's batches: rank r of w reads r, r + w, ... from ``start`` on."""
    first, step = start + process.rank, batch_size * process.world
    while True:
        yield list(range(first, first + step, process.world))
        first += step
