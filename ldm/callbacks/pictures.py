"""Draw the same pictures at every validation, to watch them become good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm.callbacks.logging import log_images, samples_seen
from ldm.callbacks.share import first, share, without_trace
from ldm.pictures import grid, to_bytes, write_png
from ldm.types import Batch, Generates

Drawn = tuple[int, str, Tensor]
"""Position in the validation set, caption, picture (3, H, W) uint8."""


class Pictures(L.Callback):
    """Draws the first samples of the validation set at each validation, always with the same random numbers.

    Writes ``pictures/<stage>-<samples seen>.png`` in the run folder, captions in the file's text, and
    logs the pictures to W&B. A stage whose ``generate_shows_input`` is true (the autoencoder) gets its
    input at the left of each picture. Stages that make no pictures are left alone.

    Args:
        num: Number of pictures.
        seed: Seed of their random numbers.
        folder: Where to write them; None means ``pictures`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, num: int = 16, seed: int = 0, folder: str | None = None) -> None:
        self.num = num
        self.seed = seed
        self.folder = folder
        self._drawn: list[Drawn] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new sheet."""
        self._drawn = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the samples of this batch that are among the first ``num``."""
        missing = share(trainer, self.num) - len(self._drawn)
        if trainer.sanity_checking or missing <= 0 or not isinstance(pl_module, Generates):
            return
        batch = first(batch, missing)
        with without_trace(pl_module):
            images = to_bytes(pl_module.generate(batch, self.seed)).cpu()
        if getattr(pl_module, "generate_shows_input", False):
            images = torch.cat([to_bytes(batch["image"]).cpu(), images], dim=-1)
        for image, caption in zip(images, captions(batch), strict=True):
            position = trainer.global_rank + len(self._drawn) * trainer.world_size
            self._drawn.append((position, caption, image))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and log the sheet of all processes' pictures."""
        if trainer.sanity_checking or not isinstance(pl_module, Generates):
            return
        drawn = sorted(_gather(self._drawn, trainer.world_size), key=lambda item: item[0])
        if drawn and trainer.is_global_zero:
            self._write(trainer, pl_module, torch.stack([d[2] for d in drawn]), [d[1] for d in drawn])

    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, images: Tensor, texts: list[str]
    ) -> None:
        stage, seen = str(getattr(pl_module, "name", "stage")), samples_seen(pl_module)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "pictures")
        says = {"stage": stage, "samples": str(seen), "seed": str(self.seed), "captions": "\n".join(texts)}
        write_png(folder / f"{stage}-{seen:010d}.png", grid(images), says)
        log_images(trainer, "pictures", images, texts)


def captions(batch: Batch) -> list[str]:
    """Name each sample by its caption, or else its label, or else its key."""
    if "text" in batch:
        return batch["text"]
    if "label" in batch:
        return [f"label {label}" for label in batch["label"].tolist()]
    return batch["key"]


def _gather(drawn: list[Drawn], world_size: int) -> list[Drawn]:
    if world_size == 1:
        return drawn
    everyones: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyones, drawn)
    return [item for one in everyones for item in one]
