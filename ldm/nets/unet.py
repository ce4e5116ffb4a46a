"""The attention U-Net of latent diffusion (Rombach et al. 2021, app. E; Ho et al. 2020, app. B).

ResNet blocks and transformers on the way down, in the middle and on the way up, with skip
connections. Graph and parameter names are those of diffusers' ``UNet2DConditionModel``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.nets.attention import AttentionBlock, Transformer2D
from ldm.nets.layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepMLP,
    Upsample,
    check_condition,
    concat_map,
    timestep_embedding,
)
from ldm.types import Cond, DenoiserDims


class UNet(Configurable, nn.Module):
    """Attention U-Net: (x_t, t, cond) -> raw output. The defaults are Stable Diffusion 1.x.

    Args:
        widths: Channels and condition widths to fit, given by the stage.
        block_out_channels: Channels of each level, finest first; each level but the last halves the size.
        layers_per_block: ResNet blocks per level on the way down; one more on the way up.
        attention: Whether a level has transformers, finest first.
        num_heads: Attention heads, one number for all levels or one per level.
        norm_groups: Groups of the group norms; divides every level's channels.
        linear_projection: Linear instead of convolutional projections around transformers (SD 2.x).
        transformers: Transformers where a level attends; False: self-attention alone, which takes no
            condition tokens, as in DDPM and in unconditional latent diffusion.
    """

    def __init__(  # eight arguments: each is a choice of a published graph
        self,
        widths: DenoiserDims,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        num_heads: int | Sequence[int] = 8,
        norm_groups: int = 32,
        linear_projection: bool = False,
        transformers: bool = True,
    ) -> None:
        super().__init__()
        channels, attends = list(block_out_channels), list(attention)
        heads = [num_heads] * len(channels) if isinstance(num_heads, int) else list(num_heads)
        _check(channels, attends, heads, norm_groups)
        if not transformers and widths.tokens is not None:
            raise ValueError("denoiser.transformers: got false with condition tokens, expected true for them")
        self.widths = widths
        self.factor = 2 ** (len(channels) - 1)
        time_width = 4 * channels[0]
        self.time_embedding = TimestepMLP(channels[0], time_width)
        self.interval_embedding = TimestepMLP(channels[0], time_width) if widths.times == 2 else None
        self.class_embedding = None if widths.vector is None else nn.Linear(widths.vector, time_width)
        self.conv_in = nn.Conv2d(widths.sample + widths.spatial, channels[0], 3, padding=1)
        options = _LevelOptions(time_width, widths.tokens, norm_groups, linear_projection, transformers)
        levels = list(zip(channels, heads, attends, strict=True))
        self.down_blocks, skips = _down(options, levels, layers_per_block)
        self.mid_block = options.stack([channels[-1]] * 2, channels[-1], heads[-1], num_transformers=1)
        self.up_blocks = _up(options, levels, layers_per_block, skips)
        self.conv_norm_out = GroupNorm(norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], widths.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict the output of the objective, from a noisy latent.

        Args:
            x: x_t, (B, C, h, w) with h and w divisible by ``factor``.
            t: (B,) timesteps; 0 is almost clean. (B, 2) where ``widths`` says so.
            cond: Condition with the fields that ``widths`` names.

        Returns:
            (B, C, h, w): noise, velocity or x_0, whichever it was trained for; or as many channels
            as ``widths`` says.

        Raises:
            ValueError: If the size cannot be halved often enough, or the condition has other fields.
        """
        check_condition(cond, self.widths)
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"denoiser.block_out_channels: {len(self.down_blocks)} levels need sizes divisible by "
                f"{self.factor}, got {x.shape[2]}x{x.shape[3]}: use fewer levels or another size of images"
            )
        time = self._embed(t, cond, x.dtype)
        hidden = self.conv_in(concat_map(x, cond.spatial, self.widths.spatial))
        if cond.tokens is not None:  # once, not for each projection of them
            cond = replace(cond, tokens=cond.tokens.to(hidden.dtype))
        skips = [hidden]
        for block in cast(Iterable[Stack], self.down_blocks):
            hidden = block.down(hidden, time, cond, skips)
        hidden = self.mid_block.middle(hidden, time, cond)
        for block in cast(Iterable[Stack], self.up_blocks):
            hidden = block.up(hidden, time, cond, skips)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that hold nearly all parameters, in no order."""
        kinds = (ResnetBlock, Transformer2D, AttentionBlock, Downsample, Upsample)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def _embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        width = self.time_embedding.linear_1.in_features
        first = t if self.interval_embedding is None else t[:, 0]
        time = self.time_embedding(timestep_embedding(first, width).to(dtype))
        if self.interval_embedding is not None:
            time = time + self.interval_embedding(timestep_embedding(t[:, 1], width).to(dtype))
        return time if self.class_embedding is None else time + self.class_embedding(cond.vector)


class Stack(nn.Module):
    """The ResNet blocks and transformers of one level, with the change of size that ends it.

    Args:
        resnets: ResNet blocks in order.
        transformers: One, or an attention, per ResNet block, or none (on the way down and up); one in the
            middle.
    """

    def __init__(
        self, resnets: Sequence[ResnetBlock], transformers: Sequence[Transformer2D | AttentionBlock]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if transformers:
            self.attentions = nn.ModuleList(transformers)
        self.attends = bool(transformers)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def _layer(self, i: int, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        x = self.resnets[i](x, time)
        if not self.attends:
            return x
        attention = self.attentions[i]
        return attention(x) if isinstance(attention, AttentionBlock) else attention(x, cond.tokens, cond.mask)

    def down(self, x: Tensor, time: Tensor, cond: Cond, skips: list[Tensor]) -> Tensor:
        """Run the level on the way down; append every intermediate map to ``skips``."""
        for i in range(len(self.resnets)):
            x = self._layer(i, x, time, cond)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x

    def middle(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Run ResNet block, transformer, ResNet block."""
        return self.resnets[1](self._layer(0, x, time, cond), time)

    def up(self, x: Tensor, time: Tensor, cond: Cond, skips: list[Tensor]) -> Tensor:
        """Run the level on the way up; take one map from ``skips`` before every ResNet block."""
        for i in range(len(self.resnets)):
            x = self._layer(i, torch.cat([x, skips.pop()], dim=1), time, cond)
        return x if self.upsamplers is None else self.upsamplers[0](x)


@dataclass(frozen=True)
class _LevelOptions:
    """Options that all levels have in common."""

    time_width: int
    token_width: int | None
    norm_groups: int
    linear_projection: bool
    transformers: bool

    def stack(self, ins: list[int], out: int, heads: int, num_transformers: int) -> Stack:
        """Make ResNet blocks from the channels ``ins`` to ``out``, and transformers."""
        resnets = [ResnetBlock(i, out, self.time_width, self.norm_groups) for i in ins]
        return Stack(resnets, [self._attention(out, heads) for _ in range(num_transformers)])

    def _attention(self, channels: int, heads: int) -> Transformer2D | AttentionBlock:
        if not self.transformers:
            return AttentionBlock(channels, self.norm_groups, heads, eps=1e-5)
        return Transformer2D(channels, self.token_width, heads, self.norm_groups, self.linear_projection)


_Levels = list[tuple[int, int, bool]]  # channels, heads, whether it has transformers; finest first


def _down(options: _LevelOptions, levels: _Levels, num_layers: int) -> tuple[nn.ModuleList, list[int]]:
    """Make the way down; also return the channels of the maps that it leaves for the way up."""
    before = levels[0][0]
    blocks, skips = nn.ModuleList(), [before]
    for i, (out, heads, attends) in enumerate(levels):
        ins = [before] + [out] * (num_layers - 1)
        block = options.stack(ins, out, heads, len(ins) if attends else 0)
        skips += [out] * num_layers
        if i + 1 < len(levels):
            block.downsamplers = nn.ModuleList([Downsample(out, symmetric=True)])
            skips.append(out)
        blocks.append(block)
        before = out
    return blocks, skips


def _up(options: _LevelOptions, levels: _Levels, num_layers: int, skips: list[int]) -> nn.ModuleList:
    """Make the way up; every ResNet block takes one of the maps ``skips`` too."""
    blocks, before = nn.ModuleList(), levels[-1][0]
    for i, (out, heads, attends) in reversed(list(enumerate(levels))):
        ins = [channels + skips.pop() for channels in [before] + [out] * num_layers]
        block = options.stack(ins, out, heads, len(ins) if attends else 0)
        if i > 0:
            block.upsamplers = nn.ModuleList([Upsample(out)])
        blocks.append(block)
        before = out
    return blocks


def _check(channels: list[int], attention: list[bool], heads: list[int], norm_groups: int) -> None:
    if not len(channels) == len(attention) == len(heads):
        raise ValueError(
            "denoiser: block_out_channels, attention and num_heads need one entry per level, got "
            f"{len(channels)}, {len(attention)} and {len(heads)}"
        )
    for width in channels:
        if width % norm_groups:
            raise ValueError(f"denoiser.norm_groups={norm_groups} does not divide the level width {width}")
