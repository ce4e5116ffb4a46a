"""A data module of a user's own, for --data."""

import lightning as L
from tiny_stage import loader


class OwnData(L.LightningDataModule):
    """Random images of 32 pixels and captions.

    Args:
        batch_size: Samples per batch.
    """

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.size = batch_size

    def train_dataloader(self):
        return loader(64, self.size, size=32)

    def val_dataloader(self):
        return loader(8, self.size, size=32)
