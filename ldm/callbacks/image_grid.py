"""Images of the same samples at every validation, as a grid: the base of such callbacks."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from ldm.callbacks.validation_subset import ValidationSubset
from ldm.distributed.dtensor import half_context
from ldm.io.images import grid, write_png
from ldm.loggers.logged import Grid
from ldm.loggers.media import last_step, log_grid, samples_seen
from ldm.types import Batch

GeneratedImages = tuple[int, str, Tensor]
"""Position in the validation set, caption, image (C, H, W) uint8."""


class ImageGrid(ValidationSubset, ABC):
    """Draws an image for each of the first validation samples at each validation; a subclass draws it.

    Writes ``images/<file prefix>-<samples seen>.png`` in the run folder, captions in the file's text, and
    logs the grid to the loggers. A stage that it cannot draw with is left alone; a grid that cannot be drawn
    or written is a warning.

    Args:
        num: Number of samples.
        seed: Seed of their random numbers.
        folder: Where to write; None means ``images`` in the trainer's ``default_root_dir``.
    """

    panel: ClassVar[str]
    """Name of the panel in W&B."""
    columns: ClassVar[int | None] = None
    """Images per row; None makes the grid about square."""

    def __init__(self, num: int, seed: int, folder: str | None) -> None:
        super().__init__(num)
        self.seed = seed
        self.folder = folder
        self._drawn: list[GeneratedImages] = []

    @abstractmethod
    def fits(self, pl_module: L.LightningModule) -> bool:
        """Return whether a stage can draw these images."""

    @abstractmethod
    def draw(self, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        """Draw one image per sample: (B, C, H, W) uint8, on any device."""

    def file_prefix(self, pl_module: L.LightningModule) -> str:
        """Return the name of the files before their number."""
        return self.panel

    def metadata(self) -> dict[str, str]:
        """Return further text for the files."""
        return {}

    @override
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        self._drawn = []
        return self.fits(pl_module)

    @override
    def add(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> None:
        with half_context(pl_module):  # Lightning's is left
            images = self.draw(pl_module, batch).cpu()
        self._drawn += zip(batch["index"].tolist(), captions(batch), images, strict=True)

    @override
    def fail(self, error: Exception) -> None:
        self._warn("drawn", error)

    @override
    def finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        drawn = sorted(_gather(self._drawn, trainer.world_size), key=lambda item: item[0])
        if drawn and trainer.is_global_zero:
            try:
                self._write(trainer, pl_module, torch.stack([d[2] for d in drawn]), [d[1] for d in drawn])
            except Exception as error:  # a full disk, or a logger
                self._warn("written", error)

    def _warn(self, action: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"{self.panel}: this validation's grid cannot be {action} ({reason})", stacklevel=2)

    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, images: Tensor, texts: list[str]
    ) -> None:
        stage, seen = str(getattr(pl_module, "name", "stage")), samples_seen(pl_module)
        order = [c for c in trainer.callbacks if isinstance(c, ImageGrid)].index(self)  # type: ignore[attr-defined]
        folder = Path(self.folder or Path(trainer.default_root_dir) / "images")
        metadata = {
            "stage": stage,
            "samples": str(seen),
            "seed": str(self.seed),
            "captions": "\n".join(texts),
            "panel": self.panel,
            "step": str(last_step(trainer)),
            "order": str(order),
        }
        path = folder / f"{self.file_prefix(pl_module)}-{seen:010d}.png"
        write_png(path, grid(images, self.columns), {**metadata, **self.metadata()})
        log_grid(trainer, Grid(self.panel, path, metadata["captions"]), order)


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
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, drawn)
    return [item for drawn in gathered for item in drawn]
