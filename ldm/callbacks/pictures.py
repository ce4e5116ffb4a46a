"""Draw the same pictures at every validation, to watch them become good."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from ldm.callbacks.sheets import Sheet
from ldm.pictures import to_bytes
from ldm.types import Batch, Generates


class Pictures(Sheet):
    """Draws the first samples of the validation set at each validation, always with the same random numbers.

    Writes ``pictures/<stage>-<samples seen>.png`` in the run folder, captions in the file's text, and
    logs the pictures to W&B. A stage whose ``generate_shows_input`` is true (the autoencoder) gets its
    input at the left of each picture. Stages that make no pictures are left alone.

    Args:
        num: Number of pictures.
        seed: Seed of their random numbers.
        folder: Where to write them; None means ``pictures`` in the trainer's ``default_root_dir``.
    """

    panel = "pictures"

    def __init__(self, num: int = 16, seed: int = 0, folder: str | None = None) -> None:
        super().__init__(num, seed, folder)

    def fits(self, pl_module: L.LightningModule) -> bool:
        """Tell whether a stage makes pictures."""
        return isinstance(pl_module, Generates)

    def what(self, pl_module: L.LightningModule) -> str:
        """Call the files by the stage."""
        return str(getattr(pl_module, "name", "stage"))

    def draw(self, pl_module: L.LightningModule, batch: Batch) -> Tensor:
        """Generate one picture per sample."""
        assert isinstance(pl_module, Generates)
        images = to_bytes(pl_module.generate(batch, self.seed))
        if getattr(pl_module, "generate_shows_input", False):
            images = torch.cat([to_bytes(batch["image"]).to(images.device), images], dim=-1)
        return images
