"""The first samples of a validation set, split over processes."""

from __future__ import annotations

import lightning as L

from ldm.types import Batch


def local_count(trainer: L.Trainer, num_samples: int) -> int:
    """Return how many of the first ``num_samples`` samples are this process's.

    Process r of w validates samples r, r + w, r + 2 w, ...
    """
    return len(range(trainer.global_rank, num_samples, trainer.world_size))


def take_first(batch: Batch, count: int) -> Batch:
    """Take the first ``count`` samples of a batch."""
    return {name: field[:count] for name, field in batch.items()}  # type: ignore[return-value, index]
