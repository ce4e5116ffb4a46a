"""Sources of samples, and their batches: common to all readers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.bucket_rows import Shapes
from ldm.data.buckets import Size
from ldm.data.decode import BadSample, Skipped
from ldm.data.fields import Sample, collate
from ldm.data.order import mix
from ldm.data.shard_file import peeking
from ldm.data.view import NO_AUGMENT, Augment, View
from ldm.hardware import check_shared_memory
from ldm.types import RGB8, ImageKind

AHEAD = 2
"""Remote shards that are staged while the one before them is read from front to back."""
MAX_BAD = 100
"""Samples that cannot be used in a row, after which training stops."""


@dataclass(frozen=True)
class SampleSpec:
    """Fields and size of training samples.

    Args:
        fields: Names of fields.
        image_size: Side of the images in pixels.
        seed: Seed of the order and of all that is drawn.
        classes: Number of classes of the fields that hold some: a sample with others is a bad one.
        augment: What is drawn for each sample.
        buckets: Sizes of the images, one for each global batch; None: the square of ``image_size``.
        kind: Channels and bits of the images.
    """

    fields: tuple[str, ...]
    image_size: int
    seed: int
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    augment: Augment = NO_AUGMENT
    buckets: Shapes | None = None
    kind: ImageKind = RGB8

    def __post_init__(self) -> None:
        if "latent" in self.fields and self.augment.crop == "random":
            raise ValueError(
                "data.augment.crop: got random, but the latents were encoded from central crops, expected "
                "center (or data.fields with the image)"
            )

    def view(self, *position: int, size: Size | None = None) -> View:
        """Return what the sample at ``position`` shows, in ``size``: a function of (seed, position) alone."""
        draw = mix(self.seed, 0xD4A3, *position) >> 1
        view = self.augment.view(*(size or (self.image_size, self.image_size)), draw)
        return view if self.kind == view.kind else dataclasses.replace(view, kind=self.kind)


@dataclass(frozen=True)
class DataRank:
    """Rank of a process.

    Args:
        rank: Number of this process.
        world_size: Number of processes.
        per_node: Those of them on this node.
    """

    rank: int
    world_size: int
    per_node: int = 1


class Source(ABC):
    """An endless stream of training batches that can be continued."""

    num_samples: int | None
    """Samples of an epoch; None if it is not known."""
    shapes: Shapes | None = None
    """Sizes of the images where there are several; None: all are square."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what the order depends on in addition to the seed: primitives, compared on resume."""

    def report(self) -> list[str]:
        """Say in lines which samples are used, where not all are."""
        return []

    def counts(self, position: int) -> dict[str, int]:
        """Return for several sets how many samples of each lie before a global position."""
        return {}

    def check(self) -> None:
        """Look before the first step whether the data fit the model.

        Raises:
            ValueError: If they do not.
        """
        return None

    def captions(self, num: int, seconds: float) -> list[str]:
        """Read captions of the first ``num`` samples, for so many seconds; none without random access."""
        return []

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
        """Return the state for ``load_state_dict`` without the number of samples."""
        return {}

    def load_state_dict(self, state: dict[str, Any], position: int, new_phase: bool = False) -> None:
        """Continue after ``state``.

        Args:
            state: What ``state_dict`` gave.
            position: Global number of samples processed by then.
            new_phase: Whether other weights of sets begin a new phase.

        Raises:
            ValueError: If there are other weights, and no new phase may begin.
        """
        return None


def make_loader(
    dataset: Dataset[Sample],
    batches: Any,
    batch_size: int,
    num_workers: int,
    process: DataRank,
    persistent: bool = False,
) -> DataLoader[Sample]:
    """Make a loader over lists of ``batch_size`` positions that ``batches`` yields."""
    if num_workers:
        with peeking():
            batch_bytes = batch_size * num_bytes(dataset[0])
        check_shared_memory("data.num_workers", num_workers, batch_bytes, process.per_node)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and num_workers > 0,
    )


def num_bytes(sample: Sample) -> int:
    """Return the size of a sample's tensors."""
    return sum(value.nbytes for value in sample.values() if isinstance(value, Tensor))


def first_usable(read: Callable[[int], Sample], positions: Sequence[int]) -> Sample:
    """Read the first usable sample; "skipped" gives the reasons of those before it.

    Raises:
        ValueError: If none can.
    """
    skipped: list[Skipped] = []
    for position in positions:
        try:
            sample = read(position)
        except BadSample as error:
            skipped.append(Skipped(error.reason, str(error)))
        else:
            return {**sample, "skipped": skipped} if skipped else sample
    raise ValueError(f"{len(positions)} samples in a row cannot be used, the last one: {skipped[-1].message}")


def rank_batches(start: int, batch_size: int, process: DataRank) -> Iterator[list[int]]:
    """Yield the global positions of a rank's batches: rank r of w reads r, r + w, ... from ``start`` on."""
    first, step = start + process.rank, batch_size * process.world_size
    while True:
        yield list(range(first, first + step, process.world_size))
        first += step
