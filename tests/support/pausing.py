"""A callback that waits before a step until a file names a later one, or a signal comes."""

import time
from pathlib import Path

import lightning as L

from ldm.checkpointing.preemption import Preemption


class Paused(L.Callback):
    """Trains until the step that the file "until" of a folder names.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: str) -> None:
        self.file = Path(folder, "until")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (notice,) = (c.notice for c in trainer.callbacks if isinstance(c, Preemption))
        while trainer.global_step >= int(self.file.read_text() or 0) and not notice.urgency:
            time.sleep(0.05)
