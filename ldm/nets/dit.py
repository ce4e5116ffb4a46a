"""The diffusion transformer (Peebles & Xie 2023, arXiv:2212.09748).

A latent is cut into patches, and transformer blocks, modulated by the timestep and the condition's vector,
attend over them. Condition tokens are attended to as in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426).
The graphs are those of facebookresearch/DiT and of diffusers' ``DiTTransformer2DModel`` and
``PixArtTransformer2DModel``.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.nets.dit_blocks import BlockModulation, DiTBlock, DiTOptions, TableModulation
from ldm.nets.layers import TimestepMLP, check_condition, concat_map, timestep_embedding
from ldm.nets.positions import rotary_2d, sincos_2d
from ldm.nets.routing import Route, RouteEnd, Routing
from ldm.rng import Noise
from ldm.types import Cond, DenoiserDims

WAVES = 256
"""Sines and cosines of the timestep."""


class DiT(Configurable, nn.Module):
    """Diffusion transformer: (x_t, t, cond) -> raw output. The defaults are DiT-XL/2.

    Sizes of the paper, by hidden / depth / heads: S 384 / 12 / 6, B 768 / 12 / 12, L 1024 / 24 / 16,
    XL 1152 / 28 / 16.

    Args:
        widths: Channels and condition widths to fit, given by the stage. A vector as wide as ``hidden`` is
            added to the timestep's embedding as it is, another one by a linear layer.
        patch_size: Side of a patch in pixels of the latent; halving it makes four times the tokens.
        hidden: Width of the transformer, a multiple of 4.
        depth: Blocks.
        heads: Attention heads; divides ``hidden``.
        options: Modulation, positions and norms; those of the paper unless given.
        position_grid: Side of the grid, in patches, that positions are interpolated to, whatever the size;
            None counts patches.
        routing: Route of blocks that some tokens pass by in training; all go through all unless given.
    """

    def __init__(
        self,
        widths: DenoiserDims,
        patch_size: int = 2,
        hidden: int = 1152,
        depth: int = 28,
        heads: int = 16,
        options: DiTOptions | None = None,
        position_grid: float | None = None,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        self.options = options = options or DiTOptions()
        _check(hidden, heads, depth, options.positions)
        if routing is not None:
            routing.check(depth)
        self.routing, self._route = routing, cast(Route | None, None)
        self.widths, self.patch_size, self.heads = widths, patch_size, heads
        self.position_grid = position_grid
        inputs = widths.sample + widths.spatial
        self.patch_embedding = nn.Conv2d(inputs, hidden, patch_size, stride=patch_size)
        self.time_embedding = TimestepMLP(WAVES, hidden)
        self.interval_embedding = TimestepMLP(WAVES, hidden) if widths.times == 2 else None
        self.vector_embedding = None if widths.vector in (None, hidden) else nn.Linear(widths.vector, hidden)
        self.token_embedding = None if widths.tokens is None else TokenMLP(widths.tokens, hidden)
        has_tokens = widths.tokens is not None
        single = options.modulation == "single" if options.modulation else has_tokens
        self.modulation = BlockModulation(hidden, 6) if single else None
        self.transformer_blocks = nn.ModuleList(
            [DiTBlock(hidden, heads, has_tokens, single, options, i == 0) for i in range(depth)]
        )
        self.route_end = None if routing is None else routing.end(hidden)
        self.norm_out = options.norm(hidden)
        self.modulation_out = (TableModulation if single else BlockModulation)(hidden, 2)
        self.proj_out = nn.Linear(hidden, patch_size**2 * widths.out_channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict the output of the objective, from a noisy latent.

        Args:
            x: x_t, (B, C, h, w) with h and w divisible by ``patch_size``.
            t: (B,) timesteps; (B, 2) where ``widths`` says so.
            cond: Condition with the fields that ``widths`` names.

        Returns:
            (B, C, h, w), or as many channels as ``widths`` says.

        Raises:
            ValueError: If patches do not tile the latent, or the condition has other fields.
        """
        check_condition(cond, self.widths)
        height, width = self._grid(x)
        hidden = self.patch_embedding(concat_map(x, cond.spatial, self.widths.spatial))
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, N, hidden)
        place = (height, width, hidden.shape[2], self.position_grid, x.device)
        if self.options.positions != "rotary":
            hidden = hidden + sincos_2d(*place).to(x.dtype)
        rotation = None if self.options.positions == "sincos" else self._rotation(height, width, x)
        time = self._embed(t, cond, x.dtype)
        shared = time if self.modulation is None else self.modulation(time)
        context = None if self.token_embedding is None else self.token_embedding(cast(Tensor, cond.tokens))
        values: Tensor | None = None
        route = self._route if self.training else None
        for blocks, end in self._segments():
            taken, state = None if end is None else route, (hidden, rotation, values)
            part, turned, first = state if taken is None else taken.take(*state)
            for block in blocks:
                part, first = block(part, shared, context, cond.mask, turned, first)
            hidden = part if end is None else end(hidden, part, taken)
            values = first if taken is None else values
        shift, scale = self.modulation_out(time if self.modulation is None else time[:, None]).unbind(1)
        hidden = self.proj_out(self.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
        return _images(hidden, height, self.patch_size)

    @property
    def factor(self) -> int:
        """What heights and widths of latents are multiples of."""
        return self.patch_size

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks, first one first; each returns hidden states (B, N, hidden) first."""
        return list(self.transformer_blocks)

    @property
    def routed(self) -> list[str]:
        """Names of the blocks that some tokens pass by in training."""
        if self.routing is None:
            return []
        return [f"transformer_blocks.{i}" for i in range(self.routing.first, self.routing.last + 1)]

    def draw_route(self, x: Tensor, noise: Noise) -> None:
        """Draw which tokens of latents ``x`` (B, C, h, w) are routed, in training, from now on."""
        if self.routing is not None:
            height, width = self._grid(x)
            self._route = self.routing.draw(len(x), height * width, x, noise)

    def _segments(self) -> list[tuple[list[DiTBlock], RouteEnd | None]]:
        """List the blocks, with the end of the route of those that are on it."""
        blocks = cast(list[DiTBlock], list(self.transformer_blocks))
        if self.routing is None:
            return [(blocks, None)]
        first, end = self.routing.first, self.routing.last + 1
        return [(blocks[:first], None), (blocks[first:end], self.route_end), (blocks[end:], None)]

    def _rotation(self, height: int, width: int, x: Tensor) -> Tensor:
        head = self.proj_out.in_features // self.heads
        return rotary_2d(height, width, head, self.position_grid, x.device)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        size = self.patch_size
        if x.shape[2] % size or x.shape[3] % size:
            raise ValueError(
                f"denoiser.patch_size: patches of side {size} do not tile a latent of {x.shape[2]}x"
                f"{x.shape[3]}: use another patch size or another size of images"
            )
        return x.shape[2] // size, x.shape[3] // size

    def _embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        shift = int(self.options.as_diffusers)
        first = t if self.interval_embedding is None else t[:, 0]
        time = self.time_embedding(timestep_embedding(first, WAVES, shift=shift).to(dtype))
        if self.interval_embedding is not None:
            time = time + self.interval_embedding(timestep_embedding(t[:, 1], WAVES, shift=shift).to(dtype))
        if cond.vector is None:
            return time
        return time + (cond.vector if self.vector_embedding is None else self.vector_embedding(cond.vector))

    def _initialise(self) -> None:
        """Initialise as DiT does; what modulates, and the output, is zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.xavier_uniform_(self.patch_embedding.weight.view(len(self.patch_embedding.weight), -1))
        nn.init.zeros_(cast(Tensor, self.patch_embedding.bias))
        for module in self.modules():
            if isinstance(module, TimestepMLP | TokenMLP):
                nn.init.normal_(module.linear_1.weight, std=0.02)
                nn.init.normal_(module.linear_2.weight, std=0.02)
            elif isinstance(module, BlockModulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, DiTBlock) and module.attn2 is not None:
                nn.init.zeros_(cast(nn.Linear, module.attn2.to_out[0]).weight)
        nn.init.zeros_(self.proj_out.weight)


class TokenMLP(nn.Module):
    """Two linear layers with a GELU between them, from a condition's tokens to ``width`` (PixArt-alpha)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_width, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, L, in_width) to (B, L, width)."""
        return self.linear_2(F.gelu(self.linear_1(tokens.to(self.linear_1.weight.dtype)), approximate="tanh"))


def _images(patches: Tensor, height: int, size: int) -> Tensor:
    """Put patches (B, N, size * size * C), row by row, together: (B, C, h, w)."""
    image = patches.unflatten(2, (size, size, -1)).unflatten(1, (height, -1))  # (B, rows, columns, p, q, C)
    return image.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _check(hidden: int, heads: int, depth: int, positions: str) -> None:
    if hidden % heads or hidden % 4 or (positions != "sincos" and hidden // heads % 4):
        raise ValueError(
            f"denoiser: hidden must be a multiple of 4 and of heads, and with rotary positions of 4 heads, "
            f"got {hidden} and {heads} heads"
        )
    if depth < 1:
        raise ValueError(f"denoiser.depth must be at least 1, got {depth}")
