"""What every stage shares: steps, optimizer, logging, and what its checkpoints say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ldm.diffusion.noise import SampleNoise
from ldm.stages.optimization import AdamW
from ldm.types import Batch


class Stage(L.LightningModule, ABC):
    """A LightningModule whose subclass gives ``losses(batch, noise)``.

    All random numbers of a step are functions of (seed, samples seen, sample key): a resumed run,
    and a run on another number of processes, draws the same ones.

    Args:
        optimizer: How the parameters are updated.
    """

    name: ClassVar[str]
    config: dict[str, Any] | None = None
    """``{"class_path", "init_args"}`` that rebuilds this stage; ``ldm.fit`` and ``build`` set it."""
    samples_seen: int = 0
    """Training samples processed so far, over all processes."""
    image_size: int | None = None
    """Side of the pictures trained on; known once training has started."""

    def __init__(self, optimizer: AdamW) -> None:
        super().__init__()
        self.optimizer = optimizer

    @abstractmethod
    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Compute the step's losses, all scalars; "loss" is the one that is minimised.

        Args:
            batch: B samples.
            noise: Source of every random number, one stream per sample.
        """

    def upstream(self) -> dict[str, str]:
        """Checkpoints that this stage is built on, with their SHA-256."""
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a training batch and log its parts."""
        seed = int(torch.initial_seed()) & 0xFFFFFFFF
        losses = self.losses(batch, SampleNoise(f"{seed}/train/{self.samples_seen}", batch["key"]))
        size = len(batch["key"])
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, batch_size=size, prog_bar=True)
        return losses["loss"]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the samples of all processes; batches are equally large on each."""
        self.samples_seen += len(batch["key"]) * self.trainer.world_size
        self.log("samples", float(self.samples_seen), batch_size=len(batch["key"]))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the losses at random numbers that depend on the sample's key alone."""
        losses = self.losses(batch, SampleNoise("validation", batch["key"]))
        values = {f"val/{k}": v for k, v in losses.items()}
        self.log_dict(values, batch_size=len(batch["key"]), sync_dist=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule over the trainer's number of steps."""
        optimizer = self.optimizer.build(self.parameters())
        num_steps = self.trainer.max_steps
        schedule = LambdaLR(optimizer, lambda step: self.optimizer.factor(step, num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the stage: its class, arguments, and what it was built on."""
        checkpoint["stage"] = self.name
        checkpoint["config"] = self.config
        checkpoint["upstream"] = self.upstream()
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint["image_size"] = self.image_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this stage and was built on the same upstream checkpoints."""
        if checkpoint.get("stage") != self.name:
            found = checkpoint.get("stage")
            raise ValueError(f"checkpoint is of stage '{found}', but the config's stage is '{self.name}'")
        mine, theirs = sorted(self.upstream().items()), sorted(checkpoint["upstream"].items())
        for (path, now), (_, then) in zip(mine, theirs, strict=False):
            if now != then:
                raise ValueError(
                    f"upstream checkpoint '{path}' changed since this run began (SHA-256 {then[:12]}... then, "
                    f"{now[:12]}... now): start a new run folder, or restore the earlier file"
                )
        self.samples_seen = checkpoint["samples_seen"]
        self.image_size = checkpoint["image_size"]

    def on_fit_start(self) -> None:
        """Take the size of the pictures from the data."""
        self.image_size = getattr(self.trainer.datamodule, "image_size", self.image_size)  # type: ignore[attr-defined]
