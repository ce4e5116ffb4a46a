"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020, sec. 2.4) with its tokenizer.

Parameters carry the names of transformers' ``CLIPTextModel``, so that weights need no renaming.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ldm import class_path
from ldm.nets.attention import attend
from ldm.nets.layers import LayerNorm
from ldm.types import Caption, send

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

VOCAB_SIZE = 49408
"""Byte pairs of CLIP's tokenizer: 512 bytes, 48894 merges, and the marks of begin and end."""


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI trained with (arXiv:1606.08415, sec. 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map elementwise, any shape."""
        return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token attends to itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"text tower: heads must divide the width, got {heads} heads for width {width}")
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, width) to the same."""
        q, k, v = (self._split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        heads = attend(q, k, v, is_causal=True)
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, hidden_width: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each behind a layer norm and added."""

    def __init__(self, attention: CausalAttention, mlp: MLP, width: int) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width)
        self.self_attn = attention
        self.layer_norm2 = LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, width) to the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, width: int, context_length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.position_embedding = nn.Embedding(context_length, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, L) to (B, L, width)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextEncoder(nn.Module):
    """Layers in a row."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, width) to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextTower(nn.Module):
    """CLIP's causal text transformer up to its last layer norm, without pooling and projection.

    Args:
        width: D of the tokens.
        layers: Number of layers. Stable Diffusion 2.x conditions on the last but one of OpenCLIP's ViT-H/14,
            which has 24, so its tower has 23.
        heads: Heads of each attention; divides ``width``.
        context_length: L, begin and end marks included.
        mlp_ratio: Hidden width of the MLPs over ``width``.
        quick_gelu: Use the sigmoid approximation of GELU, as OpenAI's weights need.
        pad_id: Token that fills up short captions. Denoisers attend to it, so that it must be the one they
            were trained with: 0 in open_clip and Stable Diffusion 2.x, 49407 (the end mark) in 1.x.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int = 77,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.heads, self.context_length = width, heads, context_length
        self.mlp_ratio, self.quick_gelu, self.pad_id = mlp_ratio, quick_gelu, pad_id
        self.embeddings = Embeddings(width, context_length)
        self.encoder = TextEncoder([self._layer() for _ in range(layers)])
        self.final_layer_norm = nn.LayerNorm(width)

    def _layer(self) -> Layer:
        hidden_width = round(self.width * self.mlp_ratio)
        activation = QuickGELU() if self.quick_gelu else nn.GELU()
        return Layer(
            CausalAttention(self.width, self.heads), MLP(self.width, hidden_width, activation), self.width
        )

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw weights as Radford et al. 2021 do in their program: narrow, the more so what layers add."""
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.01)
        narrow = self.width**-0.5
        for layer in cast(Iterable[Layer], self.encoder.layers):
            attention, added = layer.self_attn, narrow * (2 * self.layers) ** -0.5
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.normal_(linear.weight, std=narrow)
                nn.init.zeros_(linear.bias)
            for linear in (attention.out_proj, layer.mlp.fc2):
                nn.init.normal_(linear.weight, std=added)
            nn.init.zeros_(attention.out_proj.bias)
            nn.init.normal_(layer.mlp.fc1.weight, std=(2 * self.width) ** -0.5)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.encoder.layers)

    @property
    def config(self) -> dict[str, Any]:
        """Class and arguments that build a tower like this one, as checkpoints carry them."""
        names = ("width", "layers", "heads", "context_length", "mlp_ratio", "quick_gelu", "pad_id")
        return {
            "class_path": class_path(TextTower),
            "init_args": {name: getattr(self, name) for name in names},
        }

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids (B, L) int64 in [0, 49408) to tokens (B, L, D) after the last layer norm."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

    def encode(self, text: list[str]) -> Tensor:
        """Map B captions to tokens (B, L, D)."""
        return self(self.tokenize(text))

    def encode_chunks(self, text: list[str], count: int) -> Tensor:
        """Map B captions of any length to the tokens of ``count`` chunks each, (B, count L, D).

        A chunk is L - 2 byte pairs between marks, encoded by itself, as A1111's web UI and compel do.
        Captions with fewer chunks are filled up with empty ones.
        """
        length, device = self.context_length, self.final_layer_norm.weight.device
        ids = tokenize_chunks(text, length, count, self.pad_id)
        return self(send(ids, device)).unflatten(0, (len(text), count)).flatten(1, 2)

    def tokenize(self, text: list[str]) -> Tensor:
        """Encode captions as byte pairs with begin and end marks; what does not fit is cut off.

        Returns:
            (B, L) int64 on the tower's device, filled up with ``pad_id``.
        """
        return send(tokenize(text, self.context_length, self.pad_id), self.final_layer_norm.weight.device)

    def clip_skip(self, count: int) -> TextTower:
        """Drop the last layers, in place; the norm after them stays.

        Args:
            count: How many; 1 gives the penultimate layer's tokens.

        Raises:
            ValueError: If no layer would be left.
        """
        if not 0 <= count < self.layers:
            raise ValueError(
                f"clip_skip: got {count}, expected 0 to {self.layers - 1}, as the text tower has "
                f"{self.layers} layers"
            )
        self.encoder.layers = self.encoder.layers[: self.layers - count]
        return self


def tokenize(text: list[str], context_length: int, pad_id: int = 0) -> Tensor:
    """Encode captions as byte pairs with begin and end marks; what does not fit is cut off.

    Returns:
        (B, ``context_length``) int64, filled up with ``pad_id``.
    """
    rows = [_cut(_ids(caption), context_length) for caption in text]
    return _filled(rows, context_length, pad_id)


def tokenize_chunks(text: list[str], context_length: int, count: int, pad_id: int = 0) -> Tensor:
    """Encode captions as chunks of ``context_length`` - 2 byte pairs, each with begin and end marks.

    Returns:
        (B ``count``, ``context_length``) int64: the chunks of a caption follow each other.
    """
    size = context_length - 2
    rows = []
    for begin, *pairs, end in map(_ids, text):
        rows += [(begin, *pairs[i * size : (i + 1) * size], end) for i in range(count)]
    return _filled(rows, context_length, pad_id)


def num_chunks(caption: str, context_length: int) -> int:
    """Count the chunks that a caption has in ``tokenize_chunks``, at least one."""
    return max(1, math.ceil((num_tokens(caption) - 2) / (context_length - 2)))


def num_tokens(caption: str) -> int:
    """Count the tokens of a caption with its begin and end marks."""
    return len(_ids(caption))


def truncated(text: list[str], context_length: int) -> float:
    """Return the share of captions whose tokens do not fit."""
    return sum(num_tokens(caption) > context_length for caption in text) / max(len(text), 1)


@lru_cache(maxsize=1)
def byte_pairs() -> SimpleTokenizer:
    """Return CLIP's tokenizer; its table of byte pairs comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer  # here: not every run has text, and it takes a second

    return SimpleTokenizer()


def caption_ids(caption: str) -> tuple[int, ...]:
    """Encode a caption as all of its byte pairs, with begin and end marks."""
    pairs = byte_pairs()
    return (pairs.sot_token_id, *pairs.encode(caption), pairs.eot_token_id)


_remembered_ids = lru_cache(maxsize=1 << 17)(caption_ids)


def _ids(caption: str) -> tuple[int, ...]:
    return caption.ids if isinstance(caption, Caption) else _remembered_ids(caption)


def _filled(rows: list[tuple[int, ...]], length: int, pad_id: int) -> Tensor:
    """Make (rows, ``length``) int64 of rows of at most that length."""
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = row
    return torch.from_numpy(ids)


def _cut(ids: tuple[int, ...], context_length: int) -> tuple[int, ...]:
    return (*ids[: context_length - 1], ids[-1]) if len(ids) > context_length else ids
