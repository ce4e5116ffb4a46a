"""Stage two: contrastive language-image pretraining."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from ldm.distributed.group import default_group
from ldm.nets.clip import CLIPModel
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.stage import Stage, global_batch_size
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

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that training needs."""
        return ("image", "text")

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Contrast the pairs of all processes: loss, and accuracy of picking the own caption."""
        world = 1 if self._trainer is None else self.trainer.world_size
        return self._contrast(
            self.net.encode_image(batch["image"]), self.net.encode_text(batch["text"]), world
        )

    def _contrast(self, image: Tensor, text: Tensor, world: int = 1) -> dict[str, Tensor]:
        from open_clip.loss import ClipLoss  # here: other stages do without

        loss = ClipLoss(
            True, gather_with_grad=True, rank=self.global_rank if world > 1 else 0, world_size=world
        )
        with torch.autocast(image.device.type, enabled=False):  # the scale reaches 100: too much for bfloat16
            scale = self.net.model.logit_scale.exp()
            captions, images = loss.get_logits(image, text, scale)
            own = loss.get_ground_truth(image.device, len(image))
            return {
                "loss": (F.cross_entropy(captions, own) + F.cross_entropy(images, own)) / 2.0,
                "accuracy": (captions.argmax(1) == own).float().mean(),
                "logit_scale": scale,
            }

    def on_validation_epoch_start(self) -> None:
        """Begin to keep vectors."""
        self._vectors: list[Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the vectors of the batch: what it is contrasted with may be at other processes."""
        vectors = (self.net.encode_image(batch["image"]), self.net.encode_text(batch["text"]))
        self._vectors.append(torch.cat(vectors, dim=1).float().cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the losses of all validation pairs, each among as many as in a batch of training.

        In the order of the shards, at the first process: the same at any number of processes whose batches
        are together as large.
        """
        group, mine = default_group(self.device), torch.cat(self._vectors)
        places = group.gather(group.rank + group.world * torch.arange(len(mine)))
        vectors = group.gather(mine)
        values = self._means(vectors[places.argsort()]) if group.rank == 0 else {}
        for name, value in group.broadcast(values).items():
            self.log(f"val/{name}", value)

    def _means(self, vectors: Tensor) -> dict[str, float]:
        """Average over parts of (N, 2E) that are as large as the pairs of a batch, or a little smaller."""
        means: dict[str, float] = {}
        for part in vectors.tensor_split(-(-len(vectors) // self._pairs)):
            image, text = part.to(self.device).chunk(2, dim=1)
            for name, value in self._contrast(image, text).items():
                means[name] = means.get(name, 0.0) + float(value) * len(part) / len(vectors)
        return means

    @property
    def _pairs(self) -> int:
        """Pairs that are contrasted at once in training."""
        trainer = self.trainer
        return global_batch_size(trainer, trainer.datamodule) // trainer.accumulate_grad_batches  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Say how many pairs are contrasted, where that is not what a step counts."""
        super().on_train_start()
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {batches}: CLIP contrasts {self._pairs} pairs at once, "
                f"not {self._pairs * batches}; only more processes or a larger data.batch_size contrast more"
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update, then keep the temperature within its bound before anyone looks at it."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.net.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to embeddings (B, E) before normalisation."""
        return self.net.image_features(image)

    def encode_image(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return self.net.encode_image(image)

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        return self.net.encode_text(text)
