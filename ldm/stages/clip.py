"""Stage two: contrastive language-image pretraining."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from open_clip.loss import ClipLoss
from torch import Tensor

from ldm.diffusion.noise import SampleNoise
from ldm.nets.clip import CLIPModel
from ldm.stages.optimization import AdamW, Optimization
from ldm.stages.stage import Stage, samples_per_step
from ldm.types import Batch

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, sec. 2.5


class CLIP(Stage):
    """Trains the symmetric contrastive loss over all processes' pairs (Radford et al. 2021, Fig. 3).

    Accumulated batches are contrasted each on its own: they make a step of more pairs, but not more to tell
    a pair from.

    Args:
        net: The two towers.
        optimizer: How the parameters are updated.
    """

    name = "clip"

    def __init__(self, net: CLIPModel, optimizer: Optimization | None = None) -> None:
        super().__init__(optimizer or AdamW(lr=1e-3))
        self.net = net

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Contrast the batch's pictures and captions: loss, and accuracy of picking the own caption."""
        image, text = self.net.encode_image(batch["image"]), self.net.encode_text(batch["text"])
        with torch.autocast(
            image.device.type, enabled=False
        ):  # the scale reaches 100: bfloat16 is too coarse
            scale = self.net.model.logit_scale.exp()
            loss = self._contrast()(image, text, scale)
            right = (image @ text.T).argmax(1) == torch.arange(len(image), device=image.device)
        return {"loss": loss, "accuracy": right.float().mean(), "logit_scale": scale}

    def on_train_start(self) -> None:
        """Say how many pairs are contrasted, where that is not what a step counts."""
        super().on_train_start()
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            pairs = samples_per_step(self.trainer, self.trainer.datamodule) // batches  # type: ignore[attr-defined]
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {batches}: CLIP contrasts {pairs} pairs at once, not "
                f"{pairs * batches}; only more processes or a larger data.batch_size contrast more"
            )

    def _contrast(self) -> ClipLoss:
        # validation contrasts within a process's batch: the last batch may differ between processes
        world = self.trainer.world_size if self.training and self._trainer is not None else 1
        rank = self.global_rank if world > 1 else 0
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then keep the temperature within its bound before anyone looks at it."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def image_features(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to embeddings (B, E) before normalisation."""
        return self.net.image_features(image)

    def encode_image(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return self.net.encode_image(image)

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        return self.net.encode_text(text)
