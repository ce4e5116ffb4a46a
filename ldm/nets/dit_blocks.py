"""Blocks of the diffusion transformer: modulated norms, attention, cross-attention and feed-forward."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.nets.attention import Attention, attend
from ldm.nets.positions import rotate

EPS = 1e-6
"""Added to the variance in norms."""
DIFFUSERS_EPS = 1e-5
"""The same before the feed-forward in diffusers' ``DiTTransformer2DModel``."""


class DiTOptions(Configurable):
    """What differs between diffusion transformers. The defaults are DiT's (Peebles & Xie 2023).

    Args:
        modulation: "block" gives each block layers of its own from the timestep to its shifts, scales and
            gates, as DiT; "single" shares one layer and adds a learned table in each block, as PixArt-alpha
            (Chen et al. 2023, arXiv:2310.00426), which saves a quarter of the parameters. None: "single" with
            condition tokens, else "block", so that diffusers has the graph.
        positions: "sincos" adds fixed embeddings to patches, "rotary" turns queries and keys, "both" does.
        rms_norm: Norms divide by the root mean square (Zhang & Sennrich 2019, arXiv:1910.07467) instead of
            subtracting the mean first.
        qk_norm: Norms of queries and keys with learned scales (Esser et al. 2024, arXiv:2403.03206, sec.
            5.3.2): half precision stays stable.
        swiglu: Feed-forward gated by SiLU (Shazeer 2020, arXiv:2002.05202), as large as without.
        value_residual: Every block's values are mixed with the first one's by two learned weights (Zhou et
            al. 2024, arXiv:2410.17897).
        as_diffusers: Waves of the timestep and the smallest variance of a norm as diffusers'
            ``DiTTransformer2DModel`` has them, which are not the paper's: for an export as DiTPipeline.
    """

    def __init__(
        self,
        modulation: Literal["block", "single"] | None = None,
        positions: Literal["sincos", "rotary", "both"] = "sincos",
        rms_norm: bool = False,
        qk_norm: bool = False,
        swiglu: bool = False,
        value_residual: bool = False,
        as_diffusers: bool = False,
    ) -> None:
        self.modulation, self.positions = modulation, positions
        self.rms_norm, self.qk_norm, self.swiglu = rms_norm, qk_norm, swiglu
        self.value_residual, self.as_diffusers = value_residual, as_diffusers

    @property
    def values(self) -> dict[str, Any]:
        """Its arguments by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def norm(self, width: int, eps: float = EPS) -> nn.Module:
        """Make a norm without parameters: modulation follows it."""
        kind = nn.RMSNorm if self.rms_norm else nn.LayerNorm
        return kind(width, eps=eps, elementwise_affine=False)


class BlockModulation(nn.Module):
    """SiLU and a linear layer from the timestep's embedding to ``count`` vectors; zero before training."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)

    def forward(self, time: Tensor) -> Tensor:
        """Map (B, width) to (B, count, width)."""
        return self.linear(F.silu(time)).unflatten(1, (self.count, -1))


class TableModulation(nn.Module):
    """A learned table, added to what all blocks share; zero before training."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(count, width))

    def forward(self, shared: Tensor) -> Tensor:
        """Map (B, count or 1, width) to (B, count, width)."""
        return self.table + shared


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, optionally rotated, normed, and mixed with earlier values.

    Args:
        width: Width of the sequence.
        heads: Heads; divides ``width``.
        qk_norm: Norm queries and keys.
        mixes_values: Mix values with those of the first block.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, mixes_values: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (
            nn.RMSNorm(width // heads, eps=EPS) if qk_norm else nn.Identity() for _ in range(2)
        )
        # not two numbers: FSDP2 splits vectors only
        self.mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes_values else None
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, rotation: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            x: (B, N, width).
            rotation: (2, N, width / heads / 2) of ``rotary_2d``, or None.
            first: (B, heads, N, width / heads), values of the first block; None in it.

        Returns:
            (B, N, width), and the values before they are mixed.
        """
        q, k, v = (self._split(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = v
        if self.mix is not None and first is not None:
            mixed = (self.mix[0] * v + self.mix[1] * first).to(v.dtype)
        heads = attend(q, k, mixed)
        return self.to_out[0](heads.transpose(1, 2).flatten(2)), v

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)


class MLP(nn.Module):
    """To four times the width and back with a GELU between (its approximation by tanh)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Two thirds of ``MLP``'s inner width, gated by the SiLU of as many: the same number of parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 8 * width // 3
        self.fc1, self.fc2 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward behind modulated norms, cross-attention between them without a norm.

    Modulation: adaLN-Zero (Peebles & Xie 2023, sec. 3.2). Cross-attention as in PixArt-alpha.

    Args:
        width: Width of the sequence.
        heads: Heads of both attentions.
        context: Whether condition tokens, projected to ``width``, are attended to.
        single: Whether the modulation is shared but for a table.
        options: What else differs.
        is_first: Whether no block comes before it.
    """

    def __init__(
        self, width: int, heads: int, context: bool, single: bool, options: DiTOptions, is_first: bool
    ) -> None:
        super().__init__()
        self.modulation = (TableModulation if single else BlockModulation)(width, 6)
        self.norm1 = options.norm(width)
        self.attn1 = SelfAttention(width, heads, options.qk_norm, options.value_residual and not is_first)
        self.attn2 = Attention(width, width, heads, bias=True) if context else None
        self.norm2 = options.norm(width, DIFFUSERS_EPS if options.as_diffusers else EPS)
        self.ff = SwiGLU(width) if options.swiglu else MLP(width)
        self.keeps_values = options.value_residual

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        rotation: Tensor | None,
        first: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the block.

        Args:
            x: (B, N, width).
            time: (B, width), or (B, 6, width) where the modulation is shared.
            context: (B, L, width) condition tokens, or None.
            mask: (B, L) bool, True = attend; None attends to all.
            rotation: Of ``rotary_2d``, or None.
            first: Values of the first block, or None.

        Returns:
            Hidden states (B, N, width); values for the blocks after it, or None.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, :, None].unbind(1)
        found, values = self.attn1(self.norm1(x) * (1 + scale1) + shift1, rotation, first)
        x = x + gate1 * found
        if self.attn2 is not None and context is not None:
            x = x + self.attn2(x, context, mask)
        x = x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)
        if not self.keeps_values:
            return x, None
        return x, values if first is None else first
