"""The attention U-Net of latent diffusion (Rombach et al. 2021, app. E; Ho et al. 2020, app. B).

ResNet blocks and transformers on the way down, in the middle and on the way up, with skip
connections. Graph and parameter names are those of diffusers' ``UNet2DConditionModel``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nets.attention import Transformer2D
from ldm.nets.layers import Downsample, GroupNorm, ResnetBlock, TimestepMLP, Upsample, timestep_embedding
from ldm.types import Cond, Widths


class UNet(nn.Module):
    """Attention U-Net: (x_t, t, cond) -> raw output. The defaults are Stable Diffusion 1.x.

    Args:
        widths: Channels and condition widths to fit, given by the stage.
        block_out_channels: Channels of each level, finest first; each level but the last halves the size.
        layers_per_block: ResNet blocks per level on the way down; one more on the way up.
        attention: Whether a level has transformers, finest first.
        num_heads: Attention heads, one number for all levels or one per level.
        norm_groups: Groups of the group norms; divides every level's channels.
        linear_projection: Linear instead of convolutional projections around transformers (SD 2.x).
    """

    def __init__(
        self,
        widths: Widths,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        attention: Sequence[bool] = (True, True, True, False),
        num_heads: int | Sequence[int] = 8,
        norm_groups: int = 32,
        linear_projection: bool = False,
    ) -> None:
        super().__init__()
        channels = list(block_out_channels)
        heads = [num_heads] * len(channels) if isinstance(num_heads, int) else list(num_heads)
        _check(channels, list(attention), heads, norm_groups)
        self.widths = widths
        self.factor = 2 ** (len(channels) - 1)
        time_width = 4 * channels[0]
        self.time_embedding = TimestepMLP(channels[0], time_width)
        self.class_embedding = None if widths.vector is None else nn.Linear(widths.vector, time_width)
        self.conv_in = nn.Conv2d(widths.sample + widths.spatial, channels[0], 3, padding=1)

        def stack(ins: list[int], out: int, level: int, attends: bool) -> Stack:
            resnets = [ResnetBlock(i, out, time_width, norm_groups) for i in ins]
            count = (1 if level == MIDDLE else len(ins)) if attends else 0
            transformers = [
                Transformer2D(out, widths.tokens, heads[level], norm_groups, linear_projection)
                for _ in range(count)
            ]
            return Stack(resnets, transformers)

        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(channels):
            before = channels[max(level - 1, 0)]
            block = stack([before] + [out] * (layers_per_block - 1), out, level, attention[level])
            skips += [out] * layers_per_block
            if level + 1 < len(channels):
                block.downsamplers = nn.ModuleList([Downsample(out, symmetric=True)])
                skips.append(out)
            self.down_blocks.append(block)

        self.mid_block = stack([channels[-1]] * 2, channels[-1], MIDDLE, True)

        self.up_blocks = nn.ModuleList()
        before = channels[-1]
        for level, out in reversed(list(enumerate(channels))):
            ins = [i + skips.pop() for i in [before] + [out] * layers_per_block]
            block = stack(ins, out, level, attention[level])
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(block)
            before = out

        self.conv_norm_out = GroupNorm(norm_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], widths.sample, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Predict what the objective asks for, from a noisy latent.

        Args:
            x: x_t, (B, C, h, w) with h and w divisible by ``factor``.
            t: (B,) timesteps; 0 is almost clean.
            cond: Condition with the fields that ``widths`` names.

        Returns:
            (B, C, h, w): noise, velocity or x_0, whichever it was trained for.

        Raises:
            ValueError: If the size cannot be halved often enough.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"denoiser.block_out_channels: {len(self.down_blocks)} levels need sizes divisible by "
                f"{self.factor}, got {x.shape[2]}x{x.shape[3]}: use fewer levels or another data.image_size"
            )
        time = self._embed(t, cond, x.dtype)
        hidden = self.conv_in(x if cond.spatial is None else torch.cat([x, cond.spatial], dim=1))
        skips = [hidden]
        for block in cast(Iterable[Stack], self.down_blocks):
            hidden = block.down(hidden, time, cond, skips)
        hidden = self.mid_block.middle(hidden, time, cond)
        for block in cast(Iterable[Stack], self.up_blocks):
            hidden = block.up(hidden, time, cond, skips)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))

    def _embed(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        waves = timestep_embedding(t, self.time_embedding.linear_1.in_features)
        time = self.time_embedding(waves.to(dtype))
        if self.class_embedding is None:
            return time
        if cond.vector is None:
            raise ValueError("the denoiser was built for a condition vector, but the condition has none")
        return time + self.class_embedding(cond.vector)


MIDDLE = -1  # the level of the middle block: the heads of the coarsest level, one transformer


class Stack(nn.Module):
    """The ResNet blocks and transformers of one level, with the change of size that ends it.

    Args:
        resnets: ResNet blocks in order.
        transformers: One per ResNet block, or none (on the way down and up); one in the middle.
    """

    def __init__(self, resnets: Sequence[ResnetBlock], transformers: Sequence[Transformer2D]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if transformers:
            self.attentions = nn.ModuleList(transformers)
        self.attends = bool(transformers)
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def _layer(self, i: int, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, cond.tokens, cond.mask) if self.attends else x

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


def _check(channels: list[int], attention: list[bool], heads: list[int], norm_groups: int) -> None:
    if not len(channels) == len(attention) == len(heads):
        raise ValueError(
            "denoiser: block_out_channels, attention and num_heads need one entry per level, got "
            f"{len(channels)}, {len(attention)} and {len(heads)}"
        )
    for width in channels:
        if width % norm_groups:
            raise ValueError(f"denoiser.norm_groups={norm_groups} does not divide the level width {width}")
