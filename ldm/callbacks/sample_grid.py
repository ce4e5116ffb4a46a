"""Draw the same images at every validation, to watch them become good."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from ldm.callbacks.image_grid import ImageGrid
from ldm.io.images import to_bytes
from ldm.types import Batch, Generates


class SampleGrid(ImageGrid):
    """Draws the first samples of the validation set at each validation, always with the same random numbers.

    Writes ``images/<stage>-<samples seen>.png`` in the run folder, captions in the file's text, and
    logs the grid to the loggers. A stage whose ``generate_shows_input`` is true (the autoencoder) gets its
    input at the left of each image. Stages that make no images are left alone.

    Args:
        num: Number of images.
        seed: Seed of their random numbers.
        folder: Where to write them; None means ``images`` in the trainer's ``default_root_dir``.
    """

    panel = "images"

    def __init__(self, num: int = 16, seed: int = 0, folder: str | None = None) -> None:
        super().__init__(num, seed, folder)

    @override
    def fits(self, pl_module: L.LightningModule) -> bool:
        return isinstance(pl_module, Generates)

    @override
    def file_prefix(self, pl_module: L.LightningModule) -> str:
        return str(getattr(pl_module, "name", "stage"))

    @override
    def draw(self, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        assert isinstance(pl_module, Generates)
        images = to_bytes(pl_module.generate(batch, self.seed))
        if getattr(pl_module, "generate_shows_input", False):
            images = torch.cat([to_bytes(batch["image"]).to(images.device), images], dim=-1)
        return images
