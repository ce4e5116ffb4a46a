"""Count optimizer steps and training samples."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ldm.io.checkpoint import saved_progress
from ldm.lightning_internals import align_loops, trainer_of
from ldm.optim.gradients import clip, part_norms, total_norm
from ldm.stage_protocols import Progress
from ldm.types import Batch


class Counted(L.LightningModule):
    """A LightningModule that counts its optimizer steps and samples; its checkpoints hold the count.

    The count grows when a step is complete. So a checkpoint holds complete steps only, also one that an error
    in the middle of a step wrote, and training resumes after the last of them.
    """

    progress: Progress
    batch_start: int
    """Training samples before the current batch, over all processes; accumulated batches count."""

    step_losses: list[dict[str, Tensor]]
    """Losses of the current step by their names in the log, for each of its accumulated batches."""

    @property
    def is_step_complete(self) -> bool:
        """Whether the current batch has ended an optimizer step."""
        return self.progress.samples == self._batch_end

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress()
        self.batch_start = self._batch_end = 0
        self.step_losses = []
        self._norms: list[Tensor] | None = None

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit" and self.trainer.global_step == 0:  # a checkpoint is loaded after this
            self.progress = Progress()

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self.batch_start = self.progress.samples if is_first else self._batch_end
        self._batch_end = self.batch_start + len(batch["key"]) * self.trainer.world_size

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.progress = Progress(self.progress.steps + 1, self._batch_end)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Return the norm of a step's gradient before it is clipped, (), on its device: computed once."""
        return total_norm(self._part_norms(optimizer))

    def _part_norms(self, optimizer: Optimizer) -> list[Tensor]:
        if self._norms is None:
            self._norms = part_norms(optimizer)
        return self._norms

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip(optimizer, self._part_norms(optimizer), gradient_clip_val)
        self._norms = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"steps": self.progress.steps, "samples": self.progress.samples}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.progress = saved_progress(checkpoint)
        if (trainer := trainer_of(self)) is not None:
            align_loops(checkpoint, self.progress.steps, trainer)


def global_batch_size(trainer: L.Trainer, data: Any) -> int:
    """Count the samples of an optimizer step, over all processes and accumulated batches.

    Args:
        trainer: Of any number of processes.
        data: What has a ``batch_size``, that of one process; else the loader has, once it is there.

    Raises:
        ValueError: If neither has one.
    """
    loader = trainer.train_dataloader
    for owner in (data, loader, getattr(loader, "batch_sampler", None)):
        if isinstance(size := getattr(owner, "batch_size", None), int):
            return size * trainer.world_size * trainer.accumulate_grad_batches
    raise ValueError(
        f"data: {type(data).__name__} has no batch_size, expected an attribute with the samples of a batch "
        "on one process: learning rates, or the pairs that CLIP contrasts, follow it"
    )
