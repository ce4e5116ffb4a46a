"""A step that takes until a signal comes, so that the signal meets a job that trains."""

import os
import time

import lightning as L

from ldm.checkpointing.preemption import Preemption


class UntilSignalled(L.Callback):
    """In one run of a job, waits in one step for a signal to this process.

    Args:
        step: Optimizer steps done by then.
        restart: Number of requeues by then.
    """

    def __init__(self, step: int, restart: int = 0) -> None:
        self.step = step
        self.restart = restart

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (notice,) = (c.notice for c in trainer.callbacks if isinstance(c, Preemption))
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if (trainer.global_step, restart) == (self.step, self.restart):
            while not notice.urgency:
                time.sleep(0.1)
