"""Captions through the text tower of a CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.io import checkpoint as ckpt
from ldm.nets.clip import CLIPModel
from ldm.nets.frozen import Frozen
from ldm.nets.text import TextTower
from ldm.types import Batch, Cond


class CLIPText(Conditioner):
    """Token sequence of a CLIP's text tower, after its last layer norm.

    All context positions are attended to, padding included, and the null condition is the empty
    caption: what Stable Diffusion does, so that its pipelines can sample an exported model.

    Args:
        checkpoint: Checkpoint or run folder of a CLIP stage, or a text tower that ``ldm.convert`` wrote.
        dropout: Share of training samples that get the empty caption.
        frozen: Keep the tower as it is, and out of this stage's checkpoints. False trains it along with the
            denoiser, from the weights of ``checkpoint``.
        clip_skip: Last layers to leave out; 1 gives the penultimate layer's tokens.
    """

    reads = ("text",)

    def __init__(
        self, checkpoint: str, dropout: float = 0.1, frozen: bool = True, clip_skip: int = 0
    ) -> None:
        super().__init__(dropout)
        tower = load_tower(checkpoint).clip_skip(clip_skip)
        self.text: nn.Module = Frozen(tower) if frozen else tower
        self.token_width = tower.width
        self._upstream = {str(checkpoint): ckpt.sha256(checkpoint)}

    @property
    def tower(self) -> TextTower:
        """The text tower, frozen or not."""
        tower = self.text.module if isinstance(self.text, Frozen) else self.text
        assert isinstance(tower, TextTower)
        return tower

    def forward(self, batch: Batch) -> Cond:
        """Encode ``batch["text"]``, B captions, to (B, L, D) tokens."""
        if "text" not in batch:
            raise ValueError("CLIPText needs captions: add 'text' to data.fields, or give prompts")
        return Cond(tokens=self._tokens(batch["text"]))

    def check(self, batch: Batch) -> None:
        """Check that each caption fits into the context of the text tower."""
        tower = self.tower
        for text in batch["text"]:
            if (found := tower.num_tokens(text)) > tower.context_length:
                raise ValueError(
                    f"prompt '{text:.60}' has {found} tokens with its begin and end marks, expected at most "
                    f"{tower.context_length}, the context of the text tower"
                )

    def null(self, batch: Batch) -> Cond:
        """Encode the empty caption, once per sample."""
        return Cond(tokens=self._tokens([""]).expand(len(batch["key"]), -1, -1))

    def _tokens(self, text: list[str]) -> Tensor:
        return self.tower.encode(text).float()

    @property
    def upstream(self) -> dict[str, str]:
        """The checkpoint of the text tower and its SHA-256."""
        return self._upstream


def load_tower(path: str) -> TextTower:
    """Rebuild the text tower of a checkpoint: a CLIP stage's, or one that is nothing but a tower.

    Args:
        path: Checkpoint file or run folder.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged or of another stage.
    """
    state = ckpt.read(path)
    if state["stage"] == "clip":
        return ckpt.build_net(state, CLIPModel).text_tower()
    if state["stage"] == "text_tower":
        return _bare_tower(state)
    found = f"checkpoint '{ckpt.find(path)}' is of stage '{state['stage']}'"
    raise ValueError(f"{found}, expected stage 'clip' or 'text_tower'")


def _bare_tower(state: Mapping[str, Any]) -> TextTower:
    with torch.device("meta"):
        tower = ckpt.instantiate(state["config"], TextTower)
    tower.load_state_dict(state["state_dict"], assign=True)
    return tower
