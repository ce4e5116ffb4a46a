"""A step that takes until a signal comes, so that the signal meets a job that trains."""

import os
import time

import lightning as L

from ldm.callbacks.preemption import Preemption


class UntilSignalled(L.Callback):
    """In the first run of a job, waits in one step for a signal to this process.

    Args:
        step: Optimizer steps done by then.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (notice,) = (c.notice for c in trainer.callbacks if isinstance(c, Preemption))
        if trainer.global_step == self.step and "SLURM_RESTART_COUNT" not in os.environ:
            while not notice.urgency:
                time.sleep(0.1)
