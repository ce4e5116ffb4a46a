"""Layers of the U-Net and the autoencoder, in the Stable Diffusion graph.

Parameter names are those of diffusers, so that weights map name by name in both directions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.types import Cond, DenoiserDims


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0, shift: int = 0) -> Tensor:
    """Embed timesteps in sines and cosines of geometric frequencies (Vaswani et al. 2017, sec. 3.5).

    Args:
        t: (B,) timesteps, integer or fractional.
        dim: Even width of the embedding.
        max_period: Period of the slowest frequency, in steps / (2 pi).
        shift: 1 to reach that; with 0 the slowest is one step of the progression faster.

    Returns:
        (B, dim) float32, cosines first.
    """
    # multiplied before it is divided, as other programs do: phases are exact to 1e-4 only
    exponent = -math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(exponent / (dim // 2 - shift))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def concat_map(x: Tensor, spatial: Tensor | None, channels: int) -> Tensor:
    """Concatenate a condition's map to the noisy latent.

    Args:
        x: (B, C, h, w).
        spatial: (B, channels, h, w), or None if ``channels`` is 0.
        channels: What the denoiser was built for.

    Raises:
        ValueError: If the map has other channels or another size.
    """
    found = (0, *x.shape[2:]) if spatial is None else (spatial.shape[1], *spatial.shape[2:])
    if found != (channels, *x.shape[2:]):
        raise ValueError(
            f"the denoiser was built for condition maps of {channels} channels and the size "
            f"of the latent, {x.shape[2]}x{x.shape[3]}, got {found[0]} channels of {found[1]}x{found[2]}"
        )
    return x if spatial is None else torch.cat([x, spatial.to(x.dtype)], dim=1)


def check_condition(cond: Cond, widths: DenoiserDims) -> None:
    """Check that a condition has tokens and a vector where a denoiser was built for them, and only there.

    Raises:
        ValueError: If it has not.
    """
    fields = {"tokens": (cond.tokens, widths.tokens), "a vector": (cond.vector, widths.vector)}
    for name, (found, built) in fields.items():
        if found is None and built is not None:
            raise ValueError(
                f"the denoiser was built for {name} as its condition, but the condition has none"
            )
        if found is not None and built is None:
            raise ValueError(f"the condition has {name}, for which the denoiser was built without a place")


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He 2018) whose statistics are computed in float32, returned in the input's dtype.

    On GPUs torch's kernel of half precision does so, and nothing of the size of the input is converted, as
    autocast would. On a CPU half precision goes to float32 and back: several times faster than its kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        if x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016), on GPUs computed and returned in half precision as group norm is."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        if x.device.type == "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TimestepMLP(nn.Module):
    """Two linear layers with a SiLU between them, from the sinusoidal embedding to ``width``."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map (B, in_width) to (B, width)."""
        return self.linear_2(F.silu(self.linear_1(embedding)))


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input (He et al. 2016; Ho et al. 2020, app. B).

    Where the sizes differ, a 1x1 convolution converts the input before it is added.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_width: Width of the timestep embedding, None in the autoencoder.
        norm_groups: Groups of the group norms; divides both channel counts.
        eps: Added to the variance: 1e-5 in the U-Net, 1e-6 in the autoencoder.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int | None,
        norm_groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(norm_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w); ``time`` is (B, time_width) or None."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution.

    Args:
        channels: Channels in and out.
        symmetric: Pad one pixel on every side (U-Net), or on the right and the bottom only
            (autoencoder), as Stable Diffusion's weights expect.
    """

    def __init__(self, channels: int, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, 2h, 2w) to (B, C, h, w)."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UnshuffleConv(nn.Conv2d):
    """A convolution over squares of pixels, their pixels as channels."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__(in_channels * patch_size**2, out_channels, 3, padding=1)
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / patch_size, W / patch_size)."""
        return super().forward(F.pixel_unshuffle(input, self.patch_size))


class ShuffleConv(nn.Conv2d):
    """A convolution to squares of pixels (Shi et al. 2016, arXiv:1609.05158, sec. 3.2)."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__(in_channels, out_channels * patch_size**2, 3, padding=1)
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, patch_size h, patch_size w)."""
        return F.pixel_shuffle(super().forward(input), self.patch_size)


def conv_in(ins: int, outs: int, patch_size: int) -> nn.Conv2d:
    """Build the first layer of a network whose positions are squares of pixels, or pixels."""
    return nn.Conv2d(ins, outs, 3, padding=1) if patch_size == 1 else UnshuffleConv(ins, outs, patch_size)


def conv_out(ins: int, outs: int, patch_size: int) -> nn.Conv2d:
    """Build the last layer of a network whose positions are squares of pixels, or pixels."""
    return nn.Conv2d(ins, outs, 3, padding=1) if patch_size == 1 else ShuffleConv(ins, outs, patch_size)
