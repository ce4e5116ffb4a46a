"""Contrastive losses of images and captions: what they are given, and the softmax over all pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ldm.io.config import Configurable
from ldm.types import send


@dataclass(frozen=True)
class Pairs:
    """The pairs of this process, and what the loss needs to know of those of the others.

    Args:
        image: (B, E) float32 unit vectors.
        text: (B, E) float32 unit vectors.
        captions: (N,) int64 on the CPU for all N = world x B pairs, in order of the processes: equal where
            captions are.
        scale: Scalar > 0, the factor of cosines: exp of what is learned.
        bias: Scalar that is added to logits, or None.
        rank: This process.
        world: Number of processes, each with B pairs.
        rows: Pairs whose logits are held at once; None holds those of all B.
    """

    image: Tensor
    text: Tensor
    captions: Tensor
    scale: Tensor
    bias: Tensor | None = None
    rank: int = 0
    world: int = 1
    rows: int | None = None

    def __len__(self) -> int:
        return len(self.image)

    def positives(self, owner: int) -> Tensor:
        """Whether captions of this process equal those of process ``owner``, (B, B) bool on the CPU."""
        ours, theirs = (self.captions[n * len(self) : (n + 1) * len(self)] for n in (self.rank, owner))
        return ours[:, None] == theirs

    def parts(self) -> list[slice]:
        """Split the pairs of this process into parts of ``rows``."""
        size = self.rows or len(self)
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def run(self, block: Callable[..., tuple[Tensor, ...]], *inputs: object) -> tuple[Tensor, ...]:
        """Compute a part; where there are several, anew in the backward pass: its logits are not kept."""
        if self.rows is None or not torch.is_grad_enabled():
            return block(*inputs)
        found: tuple[Tensor, ...] = checkpoint(block, *inputs, use_reentrant=False)
        return found


class PairLoss(Configurable, ABC):
    """A loss that contrasts each pair with all others, over all processes."""

    @abstractmethod
    def __call__(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Compute the loss and the accuracy of picking the own or an equal caption among all.

        Returns:
            Two scalars: means over this process's pairs, whose means over processes are those of all.
        """

    def validate(self, bias: object) -> None:
        """Check that the network has what the loss learns.

        Raises:
            ValueError: If it has not.
        """


class Softmax(PairLoss):
    """Symmetric cross-entropy over all pairs: Radford et al. 2021 (arXiv:2103.00020), Fig. 3.

    Each process gathers the vectors of all and keeps the logits of its own pairs with them, (B, N).
    """

    @override
    def __call__(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        images, texts = _gathered(pairs)
        positives = torch.cat([pairs.positives(owner) for owner in range(pairs.world)], dim=1)
        own = torch.arange(len(pairs), device=images.device) + pairs.rank * len(pairs)
        losses, accuracies = [], []
        for part in pairs.parts():
            rows = (
                pairs.image[part],
                pairs.text[part],
                images,
                texts,
                pairs.scale,
                own[part],
                positives[part],
            )
            loss, accuracy = pairs.run(_rows, *rows)
            losses.append(loss)
            accuracies.append(accuracy)
        if len(losses) == 1:
            return losses[0], accuracies[0]
        share = images.new_tensor([len(own[part]) / len(own) for part in pairs.parts()])
        return share @ torch.stack(losses), share @ torch.stack(accuracies)

    @override
    def validate(self, bias: object) -> None:
        if bias is not None:
            raise ValueError(
                "model.net.init_logit_bias: got a bias, expected none: Softmax does not depend on it"
            )


def contrastive(per_image: Tensor, per_text: Tensor, own: Tensor, positives: Tensor) -> Tensor:
    """Symmetric cross-entropy of picking the own caption and the own image: Radford et al. 2021, Fig. 3.

    Where captions are equal, each of their images is a positive of each, with equal weights: Yang et al. 2022
    (UniCL, arXiv:2204.03610). Without equal captions that is Radford et al.'s loss, to the bit.
    A mean and not a term per sample: a pair is contrasted with the others of its batch.

    Args:
        per_image: Logits of N captions for each of B images, (B, N).
        per_text: Logits of N images for each of B captions, (B, N).
        own: (B,) int64, index of the own caption and image.
        positives: (B, N) bool, on the CPU: whether the caption of another pair equals the own one.

    Returns:
        Scalar.
    """
    target = own
    if int(positives.sum()) > len(positives):
        target = (positives / positives.sum(dim=1, keepdim=True)).to(per_image)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2.0


def _rows(
    image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor, own: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """Contrast some pairs with all: loss and accuracy, means over them."""
    per_image, per_text = scale * image @ texts.T, scale * text @ images.T
    is_own = send(positives, own.device).gather(1, per_image.argmax(1, keepdim=True))
    return contrastive(per_image, per_text, own, positives), is_own.float().mean()


def _gathered(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return image and text vectors of all processes, (N, E); gradients reach those of each."""
    if pairs.world == 1:
        return pairs.image, pairs.text
    return torch.cat(all_gather(pairs.image)), torch.cat(all_gather(pairs.text))
