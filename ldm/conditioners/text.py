"""Captions through the text tower of a CLIP."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm import checkpoint as ckpt
from ldm.conditioners.base import Conditioner
from ldm.frozen import Frozen
from ldm.nets.clip import CLIPModel
from ldm.types import Batch, Cond


class CLIPText(Conditioner):
    """Token sequence of a frozen CLIP text tower, after its last layer norm.

    All context positions are attended to, padding included, and the null condition is the empty
    caption: what Stable Diffusion does, so that its pipelines can sample an exported model.

    Args:
        checkpoint: Checkpoint or run folder of a CLIP stage.
        dropout: Share of training samples that get the empty caption.
    """

    reads = "text"

    def __init__(self, checkpoint: str, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        clip, _ = ckpt.load_net(checkpoint, "clip", CLIPModel)
        self.clip = Frozen(clip)
        self.token_width = clip.token_width
        self._upstream = {str(checkpoint): ckpt.sha256(checkpoint)}

    def forward(self, batch: Batch) -> Cond:
        """Encode ``batch["text"]``, B captions, to (B, L, D) tokens."""
        if "text" not in batch:
            raise ValueError("CLIPText needs captions: add 'text' to data.fields, or give prompts")
        return Cond(tokens=self._tokens(batch["text"]))

    def check(self, batch: Batch) -> None:
        """Check that each caption fits into the context of the text tower."""
        clip = self.clip.module
        for text in batch["text"]:
            if (found := clip.num_tokens(text)) > clip.context_length:
                raise ValueError(
                    f"prompt '{text:.60}' has {found} tokens with its begin and end marks, expected at most "
                    f"{clip.context_length}, the context of the text tower"
                )

    def null(self, batch_size: int) -> Cond:
        """Encode the empty caption, ``batch_size`` times."""
        return Cond(tokens=self._tokens([""]).expand(batch_size, -1, -1))

    @torch.no_grad()
    def _tokens(self, text: list[str]) -> Tensor:
        return self.clip.module.text_tokens(text).float()

    @property
    def upstream(self) -> dict[str, str]:
        """The CLIP's checkpoint and its SHA-256."""
        return self._upstream
