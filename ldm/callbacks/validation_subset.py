"""The first samples of a validation set, split over processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from ldm.evaluation.isolation import without_trace
from ldm.types import Batch


class ValidationSubset(L.Callback, ABC):
    """Does something with the first samples of the validation set, and leaves no trace in training.

    Process r of w validates samples r, r + w, r + 2 w, ...

    Args:
        num_samples: Number of samples, over all processes.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._num_added = 0
        self._is_active = False

    @abstractmethod
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Begin a validation; return whether its samples are wanted, the same on all processes."""

    @abstractmethod
    def add(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> None:
        """Take samples; ``batch["index"]`` (B,) int64 is their position in the validation set."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """Go on after an error in ``add``; no further samples come in this validation."""

    @abstractmethod
    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End, on all processes, after the last sample."""

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._num_added = 0
        with without_trace(pl_module):
            self._is_active = not trainer.sanity_checking and self.begin(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        positions = range(trainer.global_rank, self.num_samples, trainer.world_size)[self._num_added :]
        if not self._is_active or not positions:
            return
        first = {name: values[: len(positions)] for name, values in batch.items()}  # type: ignore[index]
        first["index"] = torch.tensor(positions[: len(batch["key"])])
        self._num_added += len(first["index"])
        with without_trace(pl_module):
            try:
                self.add(trainer, pl_module, first)  # type: ignore[arg-type]
            except Exception as error:  # training matters more, and processes do not talk while drawing
                self._num_added = self.num_samples
                self.fail(error)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._is_active:
            self._is_active = False
            self.finish(trainer, pl_module)
