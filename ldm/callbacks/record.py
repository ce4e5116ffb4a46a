"""Writes what a run was started with, once its data are known to be there."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.folder import RunFolder
from ldm.runs.precision import check_precision


class Record(SaveConfigCallback):
    """Writes what the run was started with, once its data are known to be there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing of a run whose processes compute in different precisions."""
        check_precision(trainer, self.config.trainer.precision)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write them into the run folder, and give them to W&B; called on the first process only."""
        text = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False)
        run = RunFolder(trainer.default_root_dir)
        run.record(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbSamplesLogger):
                logger.keep_files(run.records)
