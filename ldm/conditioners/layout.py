"""Objects with their classes and boxes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.nets.attention import Attention, FeedForward
from ldm.types import Batch, Cond

FREQUENCIES = 8
"""Waves per coordinate: of 1/2 to 64 periods over the image's side."""


class Layout(Conditioner):
    """One token per box and one for the scene, made by a transformer that knows no order.

    Layouts go through a transformer into cross-attention, as in Rombach et al. 2021, sec. 4.3.1 and app.
    E.2.1. There coordinates are discrete tokens; here a box is the embedding of its class plus a projection
    of its coordinates' sines and cosines (after Li et al. 2023, arXiv:2301.07093), so boxes are a set. Of
    more than ``max_boxes`` boxes the first are taken, in training and in sampling; training logs the fraction
    of such images as ``train/truncated_layouts``. The scene's token also tells an image without
    boxes from the null condition, which is a learned token of its own.

    Args:
        num_classes: Classes of the boxes are 0 .. num_classes - 1.
        width: D of the tokens.
        max_boxes: Boxes of an image, at most.
        depth: Layers of the transformer.
        num_heads: Its attention heads; divides ``width``.
        dropout: Share of training samples that get the null condition.
    """

    reads = ("layout",)

    def __init__(
        self,
        num_classes: int,
        width: int = 128,
        max_boxes: int = 16,
        depth: int = 2,
        num_heads: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(dropout)
        self.num_classes, self.max_boxes, self.token_width = num_classes, max_boxes, width
        self.embedding = nn.Embedding(num_classes + 2, width)  # the last rows: scene, null condition
        self.coordinates = nn.Linear(4 * 2 * FREQUENCIES, width)
        self.blocks = nn.ModuleList([_Block(width, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self._has_warned = False

    def forward(self, batch: Batch) -> Cond:
        """Encode ``batch["layout"]``: B times (n, 5), class, left, top, right, bottom in [0, 1]."""
        self._require(batch)
        boxes, mask = self._padded(batch["layout"])
        tokens = self.embedding(boxes[:, :, 0].long()) + self.coordinates(waves(boxes[:, :, 1:]))
        scene = self.embedding.weight[self.num_classes].expand(len(boxes), 1, -1)
        tokens = torch.cat([scene, tokens], dim=1)
        for block in cast(Iterable[_Block], self.blocks):
            tokens = block(tokens, mask)
        return Cond(tokens=self.norm(tokens), mask=mask)

    def null(self, batch: Batch) -> Cond:
        """Return the learned token of "nothing is known"."""
        token = self.norm(self.embedding.weight[self.num_classes + 1])
        tokens = token.expand(len(batch["key"]), 1 + self.max_boxes, -1)
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask[:, 0] = True
        return Cond(tokens=tokens, mask=mask)

    def check(self, batch: Batch) -> None:
        """Check the boxes; warn of images with more than fit, as training does."""
        self._require(batch)
        self.check_values(batch)
        self.truncated(batch)

    @override
    def truncated(self, batch: Batch) -> dict[str, Tensor]:
        counts = [len(boxes) for boxes in batch["layout"]]
        num = sum(count > self.max_boxes for count in counts)
        if num and not self._has_warned:
            most = max(range(len(counts)), key=counts.__getitem__)
            warnings.warn(
                f"{num} of {len(counts)} layouts are cut to the first {self.max_boxes} boxes "
                f"(conditioner.max_boxes): that of sample '{batch['key'][most]}' has {counts[most]}",
                stacklevel=2,
            )
        self._has_warned |= num > 0
        return {"truncated_layouts": torch.full((), num / len(counts), device=self.embedding.weight.device)}

    @property
    @override
    def classes(self) -> dict[str, int]:
        return {"layout": self.num_classes}

    def check_values(self, batch: Batch) -> None:
        """Check that each box has one of the classes."""
        for key, boxes in zip(batch["key"], batch.get("layout", []), strict=False):
            bad = [int(found) for found in boxes[:, 0].tolist() if not 0 <= found < self.num_classes]
            if bad:
                raise ValueError(
                    f"sample '{key}': class {bad[0]} of a box is no class of the model, expected 0 to "
                    f"{self.num_classes - 1} (conditioner.num_classes={self.num_classes})"
                )

    def _padded(self, layout: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Stack boxes to (B, max_boxes, 5), and mark the tokens that are real: (B, 1 + max_boxes) bool."""
        device = self.embedding.weight.device
        boxes = torch.zeros(len(layout), self.max_boxes, 5, device=device)
        mask = torch.zeros(len(layout), 1 + self.max_boxes, dtype=torch.bool)
        mask[:, 0] = True
        for row, found in enumerate(layout):
            mask[row, 1 : 1 + len(found)] = True
        # indices are found on the CPU: to look for them on the device would be to wait for it
        rows, columns = (index.to(device) for index in mask[:, 1:].nonzero(as_tuple=True))
        boxes[rows, columns] = torch.cat([found[: self.max_boxes] for found in layout]).to(boxes)
        return boxes, mask.to(device)


class _Block(nn.Module):
    """Self-attention among real tokens and feed-forward, each behind a layer norm and added."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, width, num_heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, mask)
        return x + self.ff(self.norm2(x))


def waves(x: Tensor) -> Tensor:
    """Map coordinates (..., n) in [0, 1] to sines and cosines of pi 2^k x, (..., 2 n FREQUENCIES)."""
    phases = x[..., None] * torch.pi * 2.0 ** torch.arange(FREQUENCIES, device=x.device)
    return torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(-2)
