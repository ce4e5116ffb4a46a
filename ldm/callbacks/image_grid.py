"""Something drawn for the same samples at every validation, on one sheet: what all such callbacks share."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor

from ldm.callbacks.validation_subset import local_count, take_first
from ldm.evaluation.isolation import without_trace
from ldm.io.images import grid, write_png
from ldm.loggers.media import log_images, samples_seen
from ldm.types import Batch

GeneratedImages = tuple[int, str, Tensor]
"""Position in the validation set, caption, image (3, H, W) uint8."""


class ImageGrid(L.Callback, ABC):
    """Draws the first samples of the validation set at each validation; a subclass says what and how.

    Writes ``images/<what>-<samples seen>.png`` in the run folder, captions in the file's text, and logs
    the images to W&B. A stage that it cannot draw with is left alone; a sheet that cannot be drawn or
    written is a warning.

    Args:
        num: Number of samples.
        seed: Seed of their random numbers.
        folder: Where to write; None means ``images`` in the trainer's ``default_root_dir``.
    """

    panel: ClassVar[str]
    """Name of the panel in W&B."""
    columns: ClassVar[int | None] = None
    """Images per row; None makes the sheet about square."""

    def __init__(self, num: int, seed: int, folder: str | None) -> None:
        self.num = num
        self.seed = seed
        self.folder = folder
        self._drawn: list[GeneratedImages] = []
        self._failed = False

    @abstractmethod
    def fits(self, pl_module: L.LightningModule) -> bool:
        """Tell whether this can be drawn with a stage."""

    @abstractmethod
    def draw(self, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        """Draw one image per sample: (B, 3, H, W) uint8, on any device."""

    def what(self, pl_module: L.LightningModule) -> str:
        """Return what the files are called before their number."""
        return self.panel

    def metadata(self) -> dict[str, str]:
        """Return what else the files say of themselves."""
        return {}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new sheet."""
        self._drawn, self._failed = [], False

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
        missing = local_count(trainer, self.num) - len(self._drawn)
        if trainer.sanity_checking or missing <= 0 or self._failed or not self.fits(pl_module):
            return
        batch = take_first(batch, missing)
        with without_trace(pl_module):
            try:
                images = self.draw(pl_module, batch).cpu()
            except Exception as error:  # training matters more, and processes do not talk while drawing
                self._fail("drawn", error)
                return
        for image, caption in zip(images, captions(batch), strict=True):
            position = trainer.global_rank + len(self._drawn) * trainer.world_size
            self._drawn.append((position, caption, image))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and log the sheet of all processes' images."""
        if trainer.sanity_checking or not self.fits(pl_module):
            return
        drawn = sorted(_gather(self._drawn, trainer.world_size), key=lambda item: item[0])
        if drawn and trainer.is_global_zero:
            try:
                self._write(trainer, pl_module, torch.stack([d[2] for d in drawn]), [d[1] for d in drawn])
            except Exception as error:  # a full disk, or a logger
                self._fail("written", error)

    def _fail(self, how: str, error: Exception) -> None:
        self._failed = True
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"{self.panel}: this validation's sheet cannot be {how} ({reason})", stacklevel=2)

    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, images: Tensor, texts: list[str]
    ) -> None:
        stage, seen = str(getattr(pl_module, "name", "stage")), samples_seen(pl_module)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "images")
        metadata = {
            "stage": stage,
            "samples": str(seen),
            "seed": str(self.seed),
            "captions": "\n".join(texts),
        }
        path = folder / f"{self.what(pl_module)}-{seen:010d}.png"
        write_png(path, grid(images, self.columns), {**metadata, **self.metadata()})
        log_images(trainer, self.panel, images, texts)


def captions(batch: Batch) -> list[str]:
    """Name each sample by its caption, or else its label, or else its key."""
    if "text" in batch:
        return batch["text"]
    if "label" in batch:
        return [f"label {label}" for label in batch["label"].tolist()]
    return batch["key"]


def _gather(drawn: list[GeneratedImages], world_size: int) -> list[GeneratedImages]:
    if world_size == 1:
        return drawn
    everyones: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyones, drawn)
    return [item for one in everyones for item in one]
