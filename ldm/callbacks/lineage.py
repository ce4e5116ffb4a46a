"""Lineage in W&B of a run: what it is built on, and at its end its checkpoints."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from ldm.data.manifest import folders
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.artifacts import publish_run, use_upstream, use_weights
from ldm.runs.folder import RunFolder
from ldm.stage_protocols import progress_of


class Lineage(L.Callback):
    """Records artifacts of W&B, on the first process alone; ``ldm.fit`` adds it for --wandb.artifacts true.

    Args:
        run: Folder of the run.
        weights: Checkpoint whose weights a new run starts with.
    """

    def __init__(self, run: RunFolder, weights: str | None = None) -> None:
        self.run, self.weights = run, weights

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loggers = _loggers(trainer)
        if not loggers:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        latents = folders(data.train_shards, "data.train") if "latent" in getattr(data, "fields", ()) else []
        use_upstream(loggers, _stage(pl_module).upstream(), latents)
        if self.weights is not None:
            use_weights(loggers, self.weights)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # comes after on_train_end, in which the last checkpoint is written; not to a run that is stopped
        stage = _stage(pl_module)
        about = {"samples": progress_of(stage).samples, "upstream": stage.upstream()}
        publish_run(_loggers(trainer), self.run, stage.name, about)


def _loggers(trainer: L.Trainer) -> list[WandbSamplesLogger]:
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, WandbSamplesLogger)]


def _stage(module: L.LightningModule) -> Any:
    return module
