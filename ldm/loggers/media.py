"""Log images and records of values to W&B, and the x axis to all loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from ldm.io.images import to_bytes
from ldm.types import progress_of


def samples_seen(pl_module: L.LightningModule) -> int:
    """Return the training samples processed so far, the x axis of everything logged."""
    return progress_of(pl_module).samples


def log_samples(pl_module: L.LightningModule) -> None:
    """Log the x axis with the values of a validation."""
    pl_module.log("samples", float(samples_seen(pl_module)), batch_size=1, sync_dist=True)


def log_images(trainer: L.Trainer, key: str, images: Tensor, captions: Sequence[str]) -> None:
    """Log images with captions to W&B; other loggers take none.

    As images, not in a table: a table loses them offline.

    Args:
        trainer: Whose loggers.
        key: Name of the panel.
        images: (N, 3, H, W), uint8 or float in [-1, 1].
        captions: N texts.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers or not trainer.is_global_zero:
        return
    import wandb

    pixels = to_bytes(images) if images.is_floating_point() else images
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    for logger in loggers:
        logged = [wandb.Image(array, caption=text) for array, text in zip(arrays, captions, strict=True)]
        progress = progress_of(trainer.lightning_module)
        logger.experiment.log(
            {key: logged, "samples": progress.samples, "trainer/global_step": progress.steps}
        )


def log_records(trainer: L.Trainer, records: Mapping[str, Mapping[str, object]]) -> None:
    """Put the records of values, by their names, into W&B's config of the run; other loggers take none.

    Those of other values stay.
    """
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, WandbLogger):
            config = logger.experiment.config
            config.update({"records": {**config.get("records", {}), **records}}, allow_val_change=True)
