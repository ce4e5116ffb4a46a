"""What the readers have in common: where samples come from, and how they become batches."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ldm.data.decode import Members
from ldm.data.fields import FIELDS, Sample, collate
from ldm.data.files import ShardFiles
from ldm.data.index import Summary, fingerprint
from ldm.data.order import mix

MAX_BAD = 100
"""Samples that cannot be used in a row, after which training stops."""


@dataclass(frozen=True)
class SampleSpec:
    """What is read of training samples.

    Args:
        fields: Names of fields.
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
        world_size: Number of processes.
    """

    rank: int
    world_size: int


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
            position: Gives the global number of samples processed; called whenever an iteration begins.
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
        fields: Names of the fields that are read; captions are the canonical ones.
        image_size: Side of the images in pixels.
    """

    def __init__(self, files: ShardFiles, fields: Sequence[str], image_size: int) -> None:
        self.files = files
        self.fields = tuple(fields)
        self.image_size = image_size
        self.ends = np.cumsum([summary.count for summary in files.summaries])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fingerprint(self, num: int) -> str:
        """Hash which images the first ``num`` are: shards by name, size and count, and the images' side.

        The same wherever the shards lie.
        """
        what = [fingerprint(self.files.summaries), self.image_size, min(num, len(self))]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def identity(self, num: int) -> str:
        """Return text that changes when the first ``num`` images do, or when shards are written anew."""
        return f"{self.fingerprint(num)} {[summary.mtime_ns for summary in self.files.summaries]}"

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at a position in [0, len)."""
        shard = int(np.searchsorted(self.ends, position, side="right"))
        row = position - int(self.ends[shard] - self.files.summaries[shard].count)
        return self.files.sample(shard, row, self.fields, self.image_size, draw=None)

    def loader(self, batch_size: int, num_workers: int, process: DataRank) -> DataLoader[Sample]:
        """Make the loader of one process.

        Rank r of w reads positions r, r + w, ...: each sample once over all ranks, no padding. All ranks get
        the same number of batches (of sizes that differ by one at most, so up to batch_size + 1), because a
        model under DDP synchronises its buffers on every forward pass.
        """
        positions = np.arange(process.rank, len(self), process.world_size)
        num_batches = max(1, -(-(len(self) // process.world_size) // batch_size))
        batches = [batch.tolist() for batch in np.array_split(positions, num_batches)]
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


def shard_fields(files: ShardFiles, shard: int, fields: Collection[str]) -> set[str]:
    """Return those of ``fields`` that a shard gives: all of its samples must have a member for it.

    Where only json members could give one, the first sample is looked into.
    """
    summary = files.summaries[shard]
    found = {name for name in fields if _num_plain(summary, name) >= summary.count}
    in_json = {name for name in fields if FIELDS[name].json_keys} - found
    if in_json and summary.present["json"] == summary.count:
        meta = Members(*files.members(shard, 0, ("json",))).json()
        found |= {name for name in in_json if not meta.keys().isdisjoint(FIELDS[name].json_keys)}
    return found


def _num_plain(summary: Summary, field: str) -> int:
    return sum(summary.present[name] for name in FIELDS[field].members if name != "json")


def check_fields(files: ShardFiles, fields: Sequence[str], option: str) -> None:
    """Raise ValueError, naming ``option``, if a shard lacks one of ``fields``."""
    for shard, summary in enumerate(files.summaries):
        found = shard_fields(files, shard, fields)
        if lacking := [field for field in fields if field not in found]:
            has = ", ".join(f"{name} ({count})" for name, count in summary.present.items() if count)
            about = f"the shard {summary.path} has {summary.count} samples with members {has}"
            raise ValueError(f"{option}: asks for {lacking}, but {about}")


def rank_batches(start: int, batch_size: int, process: DataRank) -> Iterator[list[int]]:
    """Yield the global positions of a rank's batches: rank r of w reads r, r + w, ... from ``start`` on."""
    first, step = start + process.rank, batch_size * process.world_size
    while True:
        yield list(range(first, first + step, process.world_size))
        first += step
