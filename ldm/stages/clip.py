"""Stage two: contrastive language-image pretraining."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ldm.distributed.ddp import has_running_statistics
from ldm.distributed.group import default_group
from ldm.lightning_internals import trainer_of
from ldm.losses.contrastive import PairLoss, Pairs, Softmax
from ldm.losses.sigmoid import Sigmoid
from ldm.nets.clip import CLIPModel
from ldm.nets.text import tokenize
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.counted import global_batch_size
from ldm.stages.stage import Stage
from ldm.types import Batch

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, sec. 2.5


class CLIP(Stage):
    """Trains a contrastive loss over all processes' pairs (Radford et al. 2021, Fig. 3).

    Accumulated batches are contrasted each on its own: they add pairs to a step, but no negatives to a pair.
    ``micro_batch`` makes room for more: gradients are those of the whole batch (Gao et al. 2021,
    arXiv:2101.06983), for one more forward pass, a third of a step's time.

    Args:
        net: The two towers.
        optimizer: Recipe of the parameters.
        loss: ``Softmax`` (CLIP) or ``Sigmoid`` (SigLIP), which is taken where the network has a bias.
        micro_batch: Pairs of a process whose activations, and whose logits, are in memory at once; None keeps
            those of all.
    """

    name = "clip"
    image_channels = 3

    def __init__(
        self,
        net: CLIPModel,
        optimizer: Optimization | None = None,
        loss: PairLoss | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(optimizer or AdamW(lr=1e-3))
        bias = net.model.logit_bias
        self.net, self.micro_batch = net, micro_batch
        self.loss = loss or (Softmax() if bias is None else Sigmoid())
        self.loss.validate(bias)
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"model.micro_batch: got {micro_batch}, expected at least 1")
        if micro_batch is not None and has_running_statistics(net):
            raise ValueError(
                "model.micro_batch: the image tower has batch norm (a residual network), and parts of a "
                "batch have other statistics: expected a vision transformer, or none"
            )
        self.context_length = net.context_length
        self.higher_is_better["accuracy"] = True

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that training needs."""
        return ("image", "text")

    def validate_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse buckets: the image tower has a position for each patch of one square."""
        names = " ".join(f"{width}x{height}" for height, width in sizes)
        raise ValueError(
            f"data.buckets: got {names}, but CLIP's image tower takes squares of one size: no buckets"
        )

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Contrast the pairs of all processes: loss, and accuracy of picking the own or an equal caption."""
        trainer = trainer_of(self)
        world_size = 1 if trainer is None else trainer.world_size
        image, text = self._encode(batch["image"], batch["text"])
        return self._contrast(image, text, self._caption_ids(batch["text"]), world_size)

    def _encode(self, image: Tensor, text: list[str]) -> tuple[Tensor, Tensor]:
        """Map pairs to unit vectors (B, E) each, keeping activations of ``micro_batch`` of them."""
        if self.micro_batch is None or not torch.is_grad_enabled():
            return self.net.encode_image(image), self.net.encode_text(text)
        starts = range(0, len(text), self.micro_batch)
        images = [image[n : n + self.micro_batch] for n in starts]
        texts = [text[n : n + self.micro_batch] for n in starts]
        kept = partial(checkpoint, use_reentrant=False)
        return (
            torch.cat([kept(self.net.encode_image, part) for part in images]),
            torch.cat([kept(self.net.encode_text, part) for part in texts]),
        )

    def _caption_ids(self, text: list[str]) -> Tensor:
        """Map B captions to (B,) int64 on the CPU, equal where the tokens that the tower gets are equal."""
        rows = tokenize(text, self.net.context_length).numpy()
        digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
        return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])

    def _contrast(
        self, image: Tensor, text: Tensor, captions: Tensor, world_size: int = 1
    ) -> dict[str, Tensor]:
        rank = self.global_rank if world_size > 1 else 0
        others = captions
        if world_size > 1:
            others = captions.new_zeros(world_size, len(captions))
            others[rank] = captions
            others = default_group(self.device).all_reduce(others).flatten()
        with torch.autocast(image.device.type, enabled=False):  # the scale reaches 100: too much for bfloat16
            scale, bias = self.net.model.logit_scale.exp().squeeze(), self.net.model.logit_bias
            bias = None if bias is None else bias.squeeze()
            pairs = Pairs(image, text, others, scale, bias, rank, world_size, self.micro_batch)
            loss, accuracy = self.loss(pairs)
        values = {"loss": loss, "accuracy": accuracy, "logit_scale": scale}
        return values if bias is None else {**values, "logit_bias": bias.clone()}  # not as it is later

    @override
    def on_validation_epoch_start(self) -> None:
        self._vectors: list[Tensor] = []
        self._captions: list[Tensor] = []

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # kept until the end: what a batch is contrasted with may be on other processes
        vectors = (self.net.encode_image(batch["image"]), self.net.encode_text(batch["text"]))
        self._vectors.append(torch.cat(vectors, dim=1).float().cpu())
        self._captions.append(self._caption_ids(batch["text"]))

    @override
    def on_validation_epoch_end(self) -> None:
        # each pair is contrasted with as many as in training, in the order of the shards, on rank 0: the same
        # values at any world size with the same global batch size
        group, local = default_group(self.device), torch.cat(self._vectors)
        indices = group.gather(group.rank + group.world * torch.arange(len(local)))
        vectors, captions = group.gather(local), group.gather(torch.cat(self._captions))
        order = indices.argsort()
        values = self._means(vectors[order], captions[order]) if group.rank == 0 else {}
        for name, value in group.broadcast(values).items():
            self.log(f"val/{name}", value)

    def _means(self, vectors: Tensor, captions: Tensor) -> dict[str, float]:
        """Average over chunks of (N, 2E) that are as large as the pairs of a batch, or a little smaller.

        Loss and accuracy depend on how many these are: the mean of their sizes is ``pairs``.
        """
        chunks = -(-len(vectors) // self._pairs)
        means = {"pairs": len(vectors) / chunks}
        for chunk, ids in zip(vectors.tensor_split(chunks), captions.tensor_split(chunks), strict=True):
            image, text = chunk.to(self.device).chunk(2, dim=1)
            for name, value in self._contrast(image, text, ids).items():
                means[name] = means.get(name, 0.0) + float(value) * len(chunk) / len(vectors)
        return means

    @property
    def _pairs(self) -> int:
        """Pairs that are contrasted at once in training."""
        trainer = self.trainer
        return global_batch_size(trainer, trainer.datamodule) // trainer.accumulate_grad_batches  # type: ignore[attr-defined]

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._pairs < 2:
            raise ValueError(
                "data.batch_size: got 1 on one process, expected at least 2: CLIP contrasts the pairs of a "
                "batch, and alone the loss is 0"
            )
        if (batches := self.trainer.accumulate_grad_batches) > 1:
            rank_zero_warn(
                f"trainer.accumulate_grad_batches is {batches}: CLIP contrasts {self._pairs} pairs at once, "
                f"not {self._pairs * batches}; a larger data.batch_size contrasts more, and "
                "model.micro_batch makes room for it"
            )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # an ldm older than this one had single numbers for logit scale and bias
        raw = [state["raw"] for state in checkpoint.get("callbacks", {}).values() if "raw" in state]
        moments = [m for of in checkpoint.get("optimizer_states", []) for m in of["state"].values()]
        for values in (checkpoint["state_dict"], *raw, *moments):
            numbers = [n for n, v in values.items() if n != "step" and isinstance(v, Tensor) and v.ndim == 0]
            values.update({name: values[name].reshape(1) for name in numbers})

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
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
