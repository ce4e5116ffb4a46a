"""Log image grids, records of values and the x axis to all loggers that take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning as L
import numpy as np
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from ldm.loggers.logged import Grid, Row, position_of_grid
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.stage_protocols import progress_of


@runtime_checkable
class TakesImages(Protocol):
    """TensorBoard's writer, and others like it."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> None:
        """Show an image under a name."""
        ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Show a text under a name."""
        ...


def samples_seen(pl_module: L.LightningModule) -> int:
    """Return the training samples processed so far, the x axis of everything logged."""
    return progress_of(pl_module).samples


def log_samples(pl_module: L.LightningModule) -> None:
    """Log the x axis with the values of a validation."""
    pl_module.log("samples", float(samples_seen(pl_module)), batch_size=1, sync_dist=True)


def log_grid(trainer: L.Trainer, grid: Grid, order: int) -> None:
    """Log an image grid that is written to loggers that take images, on the first process.

    Args:
        trainer: Whose loggers.
        grid: The grid.
        order: Its place among the grids of a validation.
    """
    progress = progress_of(trainer.lightning_module)
    step = last_step(trainer)
    values = {"samples": float(progress.samples)}
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbSamplesLogger):
            logger.log_row(Row(position_of_grid(step, order), step, values, grid))
        elif isinstance(logger, WandbLogger):
            logger.log_image(grid.panel, [str(grid.path)], step, caption=[grid.caption])
        elif isinstance(board := getattr(logger, "experiment", None), TakesImages):
            with Image.open(grid.path) as image:
                board.add_image(grid.panel, np.asarray(image), step, dataformats="HWC")
            board.add_text(f"{grid.panel}/captions", grid.caption.replace("\n", "  \n"), step)


def last_step(trainer: L.Trainer) -> int:
    """Return the step that a validation's values are logged under: steps done before the last one."""
    return max(0, progress_of(trainer.lightning_module).steps - 1)


def log_records(trainer: L.Trainer, records: Mapping[str, Mapping[str, object]]) -> None:
    """Put the records of values, by their names, into W&B's config of the run; other loggers take none.

    Those of other values stay.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            config = logger.experiment.config
            config.update({"records": {**config.get("records", {}), **records}}, allow_val_change=True)
