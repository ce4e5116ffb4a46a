"""How many samples of each set of a mixture have been trained on."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from ldm.data.module import Shards
from ldm.loggers.steps import is_logged
from ldm.stage_protocols import progress_of
from ldm.types import Batch


class MixtureCounts(L.Callback):
    """Logs ``train/samples_NAME`` at logged steps: samples of each set since the run began, repeats included.

    Nothing where ``data.train`` names one set of shards.
    """

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        data, progress = trainer.datamodule, progress_of(pl_module)  # type: ignore[attr-defined]
        if not isinstance(data, Shards) or not is_logged(trainer, progress.steps):
            return
        for name, count in data.source.counts(progress.samples).items():
            pl_module.log(f"train/samples_{name}", float(count))
