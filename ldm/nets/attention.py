"""Attention on sequences and on feature maps, in the Stable Diffusion graph (Rombach et al. 2021, 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.layers import GroupNorm, LayerNorm


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1).

    Args:
        q: (B, heads, N, d).
        k: (B, heads, L, d).
        v: (B, heads, L, d).
        mask: Broadcastable to (B, heads, N, L), bool, True = attend.
        is_causal: Attend to the same and earlier positions only; without ``mask``, which fast kernels lack.

    Returns:
        (B, heads, N, d).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's bfloat16 CPU kernel takes 15 times as long backwards as the float32 one
        with torch.autocast("cpu", enabled=False):
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, 0.0, is_causal)
            return found.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal)


class Attention(nn.Module):
    """Multi-head attention with linear projections (Vaswani et al. 2017, sec. 3.2.2).

    Args:
        width: Width of the queries' sequence and of the output.
        context_width: Width of the sequence that is attended to.
        num_heads: Heads; divides ``width``.
        bias: Bias of the projections to queries, keys and values.
    """

    def __init__(self, width: int, context_width: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads must divide the width: got {num_heads} heads for width {width}")
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from ``x`` to ``context``.

        Args:
            x: (B, N, width).
            context: (B, L, context_width).
            mask: (B, L) bool, True = attend; None attends to everything.

        Returns:
            (B, N, width).
        """
        q, k, v = (self._split(p) for p in (self.to_q(x), self.to_k(context), self.to_v(context)))
        heads = attend(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out[0](heads.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)


class GEGLU(nn.Module):
    """Linear layer gated by a GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., hidden_width)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer norm and added.

    Args:
        width: Width of the sequence.
        context_width: Width of the condition's tokens; None leaves out the cross-attention.
        num_heads: Heads of both attentions.
    """

    def __init__(self, width: int, context_width: int | None, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, width, num_heads)
        if context_width is not None:
            self.norm2 = LayerNorm(width)
            self.attn2 = Attention(width, context_width, num_heads)
        self.cross = context_width is not None
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Map (B, N, width) to the same; ``context`` (B, L, D), ``mask`` (B, L) bool, True = attend."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        if self.cross and context is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """A transformer over the positions of a feature map, added to its input.

    Args:
        channels: Channels of the map.
        context_width: Width of the condition's tokens; None leaves out the cross-attention.
        num_heads: Heads; divides ``channels``.
        norm_groups: Groups of the group norm.
        linear_projection: Project with linear layers (SD 2.x) instead of 1x1 convolutions (SD 1.x).
        depth: Transformer blocks in a row.
    """

    def __init__(
        self,
        channels: int,
        context_width: int | None,
        num_heads: int,
        norm_groups: int = 32,
        linear_projection: bool = False,
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_width, num_heads) for _ in range(depth)]
        )
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return nn.Linear(channels, channels) if self.linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """Map (B, C, h, w) to the same; ``context`` (B, L, D), ``mask`` (B, L) bool, True = attend."""
        height = x.shape[2]
        hidden = self.norm(x)
        hidden = (
            self.proj_in(_sequence(hidden)) if self.linear_projection else _sequence(self.proj_in(hidden))
        )
        for block in self.transformer_blocks:
            hidden = block(hidden, context, mask)
        if self.linear_projection:
            return x + _feature_map(self.proj_out(hidden), height)
        return x + self.proj_out(_feature_map(hidden, height))


class AttentionBlock(nn.Module):
    """Self-attention over a feature map, added to its input: the autoencoder's middle, and DDPM's U-Net.

    Args:
        channels: Channels of the map.
        norm_groups: Groups of the group norm.
        num_heads: Heads; divides ``channels``.
        eps: Added to the variance: 1e-6 in the autoencoder, 1e-5 in the U-Net.
    """

    def __init__(self, channels: int, norm_groups: int = 32, num_heads: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = GroupNorm(norm_groups, channels, eps=eps)
        attention = Attention(channels, channels, num_heads, bias=True)
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        sequence = _sequence(self.group_norm(x))
        q, k, v = (self._split(p(sequence)) for p in (self.to_q, self.to_k, self.to_v))
        hidden = self.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))
        return x + _feature_map(hidden, x.shape[2])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)


def _sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h w, C)


def _feature_map(x: Tensor, height: int) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (height, -1))  # (B, h w, C) -> (B, C, h, w)
