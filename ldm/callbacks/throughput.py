"""Training speed, the fraction of time spent waiting for data, and the share of the device in use."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from ldm.callbacks.utilization import Utilization
from ldm.hardware import DTYPES
from ldm.loggers.media import log_samples
from ldm.loggers.steps import is_logged
from ldm.types import Batch


class Throughput(L.Callback):
    """Logs speed at logged steps, over those since the one before: ``trainer.log_every_n_steps`` of them.

    - ``train/images_per_second``: over all processes; ``..._per_device``: of one.
    - ``train/data_wait``: share of the time, in [0, 1], between the end of a step and the next batch. On a
      GPU, which works on while the host waits, an upper bound of what faster data would save.
    - ``train/step_seconds``: wall clock of one optimizer step, data included.

    - ``train/time_forward``, ``..._backward``, ``..._optimizer``: shares of one batch of the interval before,
      by the device's clock. The first has the frozen encoders, the last clipping and averages.
    - ``train/mfu``: arithmetic of the networks over the peak of matrix products, which is measured before the
      first step (Chowdhery et al. 2022, app. B). ``train/gflop_per_sample``: that arithmetic, forwards and
      backwards, counted in the first batch of the process. Unlike theirs it has what ActivationCheckpointing
      computes twice, so that figures with and without it compare the device's load, not the speed. A loss
      term that has not begun in that batch, such as a discriminator with ``start``, is not in it.
    - ``train/memory_gib``: the most that the tensors of the device have taken.

    Validation and the writing of checkpoints are left out. Nothing waits for the device.

    Args:
        utilization: Whether to log the last three kinds; None: on GPUs.
    """

    def __init__(self, utilization: bool | None = None) -> None:
        self.utilization = utilization
        self._device: Utilization | None = None
        self._begun: float | None = None
        self._ended: float | None = None
        self._reset()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = None
        self._reset()
        device = trainer.strategy.root_device
        is_wanted = device.type == "cuda" if self.utilization is None else self.utilization
        precision = str(trainer.precision)
        self._device = Utilization(device, DTYPES.get(precision, torch.float32)) if is_wanted else None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._begun = time.perf_counter()
        if self._ended is not None:
            self._waited += self._begun - self._ended
        if self._device is not None:
            self._size = len(batch["key"])
            is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
            self._is_timed = is_last and is_logged(trainer, trainer.global_step + 1)
            self._device.begin(self._is_timed)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._device is not None and self._is_timed:
            self._device.mark()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._device is not None:
            self._device.end_passes(self._size)
            if self._is_timed:
                self._device.mark()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._device is not None:
            self._device.end_passes()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert self._begun is not None
        self._ended = time.perf_counter()
        self._worked += self._ended - self._begun
        self._num_images += len(batch["key"])
        self._num_batches += 1
        if self._device is not None and self._is_timed:
            self._device.mark()
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if is_last and is_logged(trainer, trainer.global_step):
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
        if self._device is not None:
            values |= self._device.values(rate)
        pl_module.log_dict(values, batch_size=1)

    def _reset(self) -> None:
        self._waited = self._worked = 0.0
        self._num_images = self._num_batches = 0
        self._is_timed = False
