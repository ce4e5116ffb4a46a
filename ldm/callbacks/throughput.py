"""Training speed, and the fraction of time spent waiting for data."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from typing_extensions import override

from ldm.loggers.media import log_samples
from ldm.types import Batch


class Throughput(L.Callback):
    """Logs speed over the last ``trainer.log_every_n_steps`` optimizer steps.

    - ``train/images_per_second``: over all processes; ``..._per_device``: of one.
    - ``train/data_wait``: share of the time, in [0, 1], between the end of a step and the next batch. On a
      GPU, which works on while the host waits, an upper bound of what faster data would save.
    - ``train/step_seconds``: wall clock of one optimizer step, data included.

    Validation and the writing of checkpoints are left out.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._ended: float | None = None
        self._reset()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None
        self._reset()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._begun = time.perf_counter()
        if self._ended is not None:
            self._waited += self._begun - self._ended

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert self._begun is not None
        self._ended = time.perf_counter()
        self._worked += self._ended - self._begun
        self._num_images += len(batch["key"])
        self._num_batches += 1
        every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._num_batches == every_n_steps * trainer.accumulate_grad_batches:
            self._log(trainer, pl_module)
            self._reset()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._ended = None

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            log_samples(pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = self._waited + self._worked
        rate = self._num_images / seconds
        values = {
            "train/images_per_second": rate * trainer.world_size,
            "train/images_per_second_per_device": rate,
            "train/data_wait": self._waited / seconds,
            "train/step_seconds": seconds * trainer.accumulate_grad_batches / self._num_batches,
        }
        pl_module.log_dict(values, batch_size=1)

    def _reset(self) -> None:
        self._waited = self._worked = 0.0
        self._num_images = self._num_batches = 0
