"""Captions through the text tower of a CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.io.checkpoint import Checkpoint, instantiate
from ldm.io.upstream import open_upstream
from ldm.nets.clip import CLIPModel
from ldm.nets.frozen import Frozen
from ldm.nets.text import TextTower, num_chunks, num_tokens
from ldm.types import Batch, Cond, send


class TowerText(Conditioner):
    """Token sequence of a text tower with CLIP's graph, after its last layer norm.

    All context positions are attended to, padding included, and the null condition is the empty
    caption: what Stable Diffusion does, so that its pipelines can sample an exported model.

    Args:
        tower: The tower.
        dropout: Fraction of training samples that get the empty caption.
        frozen: Do not train the tower, nor save it in checkpoints of this stage.
        upstream: Checkpoints that the tower was read from, with their SHA-256.
    """

    reads = ("text",)
    long_prompts: Literal["cut", "chunks"] = "cut"
    """What becomes of captions longer than the context. The tokens of chunks are concatenated; shorter
    captions of a batch are filled up with chunks that nothing attends to."""

    def __init__(self, tower: TextTower, dropout: float, frozen: bool, upstream: Mapping[str, str]) -> None:
        super().__init__(dropout)
        self.text: nn.Module = Frozen(tower) if frozen else tower
        self.token_width, self.context_length = tower.width, tower.context_length
        self._upstream = dict(upstream)
        self._null: dict[tuple[torch.device, torch.dtype, torch.dtype | None], Tensor] = {}

    @property
    def tower(self) -> TextTower:
        """The text tower, frozen or not."""
        tower = self.text.module if isinstance(self.text, Frozen) else self.text
        assert isinstance(tower, TextTower)
        return tower

    @override
    def forward(self, batch: Batch) -> Cond:
        self._require(batch)
        return self._cond(batch["text"], self._num_chunks(batch))

    @override
    def check(self, batch: Batch) -> None:
        if self.long_prompts == "chunks":
            return
        texts = [*batch["text"], *batch.get("negative_text", [])]
        counts = {text: num_tokens(text) for text in texts}
        context, longest = self.tower.context_length, max(counts, key=lambda text: counts[text])
        if num := sum(counts[text] > context for text in texts):
            warnings.warn(
                f"{num} of {len(texts)} captions are cut to the {context} tokens of the text tower: "
                f"'{longest:.60}' has {counts[longest]}, begin and end marks included",
                stacklevel=2,
            )

    @override
    def null(self, batch: Batch) -> Cond:
        chunks = self._num_chunks(batch)
        if "negative_text" not in batch and chunks == 1:
            return Cond(tokens=self._null_tokens().expand(len(batch["key"]), -1, -1))
        return self._cond(batch.get("negative_text", [""] * len(batch["key"])), chunks)

    def _num_chunks(self, batch: Batch) -> int:
        """Count the chunks of the longest caption: the condition and the null condition have as many."""
        if self.long_prompts == "cut":
            return 1
        texts = [*batch.get("text", []), *batch.get("negative_text", [])]
        return max((num_chunks(text, self.tower.context_length) for text in texts), default=1)

    def _cond(self, text: list[str], chunks: int) -> Cond:
        if chunks == 1:
            return Cond(tokens=self._tokens(text))
        tokens = self.tower.encode_chunks(text, chunks).float()
        used = torch.tensor([num_chunks(caption, self.tower.context_length) for caption in text])
        mask = (torch.arange(chunks) < used[:, None]).repeat_interleave(self.tower.context_length, dim=1)
        return Cond(tokens=tokens, mask=send(mask, tokens.device))

    def _null_tokens(self) -> Tensor:
        """Encode the empty caption, (1, L, D): once, where the tower is frozen."""
        if not isinstance(self.text, Frozen):
            return self._tokens([""])
        weight = self.tower.final_layer_norm.weight
        kind = weight.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if (key := (weight.device, weight.dtype, half)) not in self._null:
            with torch.inference_mode(False), torch.no_grad():  # training uses it after validation
                self._null[key] = self._tokens([""])
        return self._null[key]

    def _tokens(self, text: list[str]) -> Tensor:
        return self.tower.encode(text).float()

    @property
    @override
    def upstream(self) -> dict[str, str]:
        return self._upstream


class CLIPText(TowerText):
    """Token sequence of a CLIP's text tower, after its last layer norm.

    Args:
        checkpoint: Checkpoint or run folder of a CLIP stage, or a text tower that ``ldm.convert`` wrote.
        dropout: Fraction of training samples that get the empty caption.
        frozen: Do not train the tower, nor save it in checkpoints of this stage. False fine-tunes it with the
            denoiser.
        clip_skip: Last layers to leave out; 1 gives the penultimate layer's tokens.
    """

    def __init__(
        self, checkpoint: str, dropout: float = 0.1, frozen: bool = True, clip_skip: int = 0
    ) -> None:
        found = open_upstream(checkpoint)
        tower = load_tower(found).clip_skip(clip_skip)
        super().__init__(tower, dropout, frozen, {checkpoint: found.sha256})


class NewText(TowerText):
    """Token sequence of a text tower that is trained from scratch, with the denoiser: no CLIP is needed.

    Args:
        width: D of the tokens.
        layers: Layers of the tower.
        heads: Heads of each attention; divides ``width``.
        context_length: Tokens of a caption, begin and end marks included.
        dropout: Fraction of training samples that get the empty caption.
    """

    def __init__(
        self, width: int, layers: int, heads: int, context_length: int = 77, dropout: float = 0.1
    ) -> None:
        tower = TextTower(width, layers, heads, context_length)
        tower.initialise()
        super().__init__(tower, dropout, frozen=False, upstream={})


def load_tower(checkpoint: Checkpoint) -> TextTower:
    """Rebuild the text tower of a CLIP stage, or one that ``ldm.convert`` imported alone.

    Raises:
        ValueError: If the checkpoint is of another stage.
    """
    if checkpoint.stage == "clip":
        return checkpoint.load_net(CLIPModel).text_tower()
    if checkpoint.stage == "text_tower":
        with torch.device("meta"):
            tower, _ = instantiate(checkpoint.state["config"], TextTower)
        weights = {name: value.clone() for name, value in checkpoint.state["state_dict"].items()}
        tower.load_state_dict(weights, assign=True)
        return tower
    found = f"checkpoint '{checkpoint.file}' is of stage '{checkpoint.stage}'"
    raise ValueError(f"{found}, expected stage 'clip' or 'text_tower'")
