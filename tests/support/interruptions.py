"""Callbacks that end a run before its time."""

import os
import signal
import time
from pathlib import Path

import lightning as L


class Stop(L.Callback):
    """Fails like a machine: while a step is computed, after its update, or in a validation.

    Args:
        step: Optimizer steps done by then.
        where: "start", "second" batch or "backward" of the next step, "end" of this one, or "validation".
    """

    def __init__(self, step: int, where: str) -> None:
        self.step = step
        self.where = where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._fail(trainer, "start")
        if batch_idx % trainer.accumulate_grad_batches == 1:
            self._fail(trainer, "second")

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self._fail(trainer, "backward")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._fail(trainer, "end")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._fail(trainer, "validation")

    def _fail(self, trainer, where):
        if where == self.where and trainer.global_step == self.step:
            raise RuntimeError("the machine went away")


class Leaves(L.Callback):
    """Takes one process of several out of the run, before a batch.

    Args:
        step: Optimizer steps done by then.
        rank: Which process.
        how: In which way, see the subclass.
    """

    def __init__(self, step: int, rank: int, how: str) -> None:
        self.step = step
        self.rank = rank
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            self.leave()


class Dies(Leaves):
    """By an "error", or by "kill" as the system does when memory runs out."""

    def leave(self):
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError(f"process {self.rank} went away")


class Hangs(Leaves):
    """Without an end: by "sleep", or by "stop" as a debugger or a frozen node does."""

    def leave(self):
        if self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_for_nothing()


def wait_for(path, seconds=60):
    for _ in range(10 * seconds):
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{path} is not there after {seconds} s")


def wait_for_nothing():
    time.sleep(10_000)


class Signalled(L.Callback):
    """Gets a signal at a given moment.

    Args:
        step: Optimizer steps done by then.
        where: "setup", before training; "backward" of the next step; or "validation".
        number: The signal.
        rank: Which process.
    """

    def __init__(self, step: int, where: str, number: int, rank: int) -> None:
        self.step = step
        self.where = where
        self.number = number
        self.rank = rank

    def setup(self, trainer, pl_module, stage):
        self._signal(trainer, "setup")

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self._signal(trainer, "backward")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.number == signal.SIGKILL:  # once the checkpoint before a validation is written
            wait_for(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        self._signal(trainer, "validation")

    def _signal(self, trainer, where):
        if (where, trainer.global_step, trainer.global_rank) == (self.where, self.step, self.rank):
            os.kill(os.getpid(), self.number)


def signalled(step, where, number, rank=0):
    options = {"step": step, "where": where, "number": int(number), "rank": rank}
    return [
        "--trainer.callbacks+=interruptions.Signalled",
        *(f"--trainer.callbacks.{key}={value}" for key, value in options.items()),
    ]
