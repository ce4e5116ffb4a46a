"""End a run that hangs, and report which process is stuck and where."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ldm.callbacks.heartbeat import HeartbeatMonitor, HeartbeatStore
from ldm.lightning_internals import kill_subprocesses
from ldm.stage_protocols import progress_of
from ldm.types import Batch


class Watchdog(L.Callback):
    """Ends a run that hangs, and reports which process is stuck, and where.

    Each process has a thread that watches whether training, validation or saving goes on, and reports
    to the others by the rendezvous store: not over the network of the gradients, which may be what hangs.
    All end with exit code 124; the same command resumes from the last checkpoint.

    Args:
        timeout: Seconds without a step, a batch of validation or a checkpoint after which the run has hung;
            more than the slowest of them takes, compilation included, and less than the 1,800 of
            torch.distributed, which names no process. None never ends a run, e.g. for a debugger.

    Raises:
        ValueError: If ``timeout`` is not positive.
    """

    def __init__(self, timeout: float | None = 900.0) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"watchdog.timeout: got {timeout:g} s, expected a positive number, or null")
        self.timeout = timeout
        self._watch: HeartbeatMonitor | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.timeout is not None and self._watch is None:
            self._watch = HeartbeatMonitor(self.timeout, _beats(trainer), lambda code: _leave(trainer, code))
            self._watch.start()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._sign(f"in batch {batch_idx}, step {progress_of(pl_module).steps}")

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._sign(f"in the backward pass of step {progress_of(pl_module).steps}")

    @override
    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self._sign(f"after the backward pass of step {progress_of(pl_module).steps}")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._sign(
            f"after step {progress_of(pl_module).steps}, where the next batch or a checkpoint is awaited"
        )

    @override
    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._sign(f"in batch {batch_idx} of the validation at step {progress_of(pl_module).steps}")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sign(f"after the validation at step {progress_of(pl_module).steps}")

    @override
    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._sign(f"while the checkpoint of step {progress_of(pl_module).steps} is written")

    def _sign(self, phase: str) -> None:
        if self._watch is not None:
            self._watch.sign(phase)


def _beats(trainer: L.Trainer) -> HeartbeatStore:
    if trainer.world_size == 1:
        return HeartbeatStore(0, 1, torch.distributed.HashStore())
    # a connection of its own: one that waits must not keep the other waiting
    store = torch.distributed.distributed_c10d._get_default_store().clone()
    return HeartbeatStore(trainer.global_rank, trainer.world_size, store)


def _leave(trainer: L.Trainer, code: int) -> None:
    """End this process, and those that it launched itself: a stopped one would never end."""
    kill_subprocesses(trainer)
    os._exit(code)
