"""The KL autoencoder (Kingma & Welling 2013; Rombach et al. 2021, sec. 3.1 and app. G).

Graph and parameter names are those of diffusers' ``AutoencoderKL``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.nets.attention import AttentionBlock
from ldm.nets.layers import Downsample, GroupNorm, ResnetBlock, Upsample, conv_in, conv_out

ENCODER, DECODER = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")
"""Modules of the network that encode, and that decode."""


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z | x) = N(mean, std^2), independent in every component.

    Attributes:
        mean: (B, C, h, w).
        log_var: (B, C, h, w), clamped to [-30, 20] so that neither std nor KL overflows.
    """

    mean: Tensor
    log_var: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split (B, 2 C, h, w) into mean and log-variance."""
        mean, log_var = moments.chunk(2, dim=1)
        return cls(mean, log_var.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, C, h, w)."""
        return torch.exp(0.5 * self.log_var)

    def sample(self, noise: Tensor) -> Tensor:
        """Draw z = mu + sigma * eps (reparameterisation; Kingma & Welling 2013, sec. 2.4)."""
        return self.mean + self.std * noise


def downsampling(block_out_channels: Sequence[int]) -> int:
    """Return how many pixels along a side make one latent."""
    return 2 ** (len(block_out_channels) - 1)


def check_size(factor: int, height: int, width: int) -> None:
    """Check that the sides of images can be halved often enough.

    Raises:
        ValueError: If one is not divisible by ``factor``.
    """
    if height % factor or width % factor:
        raise ValueError(
            f"net.block_out_channels: the autoencoder needs sizes divisible by {factor}, got "
            f"{height}x{width}: use fewer levels or another size of images"
        )


class KLAutoencoder(Configurable, nn.Module):
    """Convolutional autoencoder with a diagonal Gaussian latent. The defaults are Stable Diffusion 1.x.

    Args:
        latent_channels: C of the latent.
        block_out_channels: Channels of each level, finest first; each level but the last halves the size.
        layers_per_block: ResNet blocks per level of the encoder; the decoder has one more.
        norm_groups: Groups of the group norms; divides every level's channels.
        image_channels: Channels of the image; None takes ``data.image.channels``, without data 3.
        attention: Whether self-attention follows the ResNet blocks of each level, finest first; default: of
            none. The middle has one in any case.
        patch_size: Side of squares of pixels that are the first level's channels (Wan 2.2 has 2), so that
            there is no level at the images' size, where most of the time goes; 1: each pixel by itself.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        image_channels: int | None = None,
        attention: Sequence[bool] | None = None,
        patch_size: int = 1,
    ) -> None:
        super().__init__()
        channels = list(block_out_channels)
        attends = [False] * len(channels) if attention is None else list(attention)
        if len(attends) != len(channels):
            raise ValueError(f"net.attention={attends}, expected one for each level of {channels}")
        if patch_size < 1:
            raise ValueError(f"net.patch_size: got {patch_size}, expected at least 1")
        for width in channels:
            if width % norm_groups:
                raise ValueError(f"net.norm_groups={norm_groups} does not divide the level width {width}")
        self.latent_channels, self.image_channels = latent_channels, image_channels or 3
        self.factor = patch_size * downsampling(channels)
        shape = channels, layers_per_block, norm_groups, attends, patch_size
        self.encoder = Encoder(self.image_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, self.image_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Encode images.

        Args:
            image: (B, image_channels, H, W) in [-1, 1], H and W divisible by ``factor``.

        Returns:
            q(z | image) with (B, C, H / factor, W / factor) components, unscaled.

        Raises:
            ValueError: If the size cannot be halved often enough.
        """
        check_size(self.factor, image.shape[2], image.shape[3])
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(image)))

    def decode(self, z: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) to images, about [-1, 1], not clamped."""
        return self.last_layer(self.hidden(z))

    @property
    def last_layer(self) -> nn.Conv2d:
        """The decoder's last layer, which makes images of what ``hidden`` returns."""
        return self.decoder.conv_out

    def hidden(self, z: Tensor) -> Tensor:
        """Decode unscaled latents (B, C, h, w) up to the last layer."""
        return self.decoder.hidden(self.post_quant_conv(z))

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        """Encode, draw z with standard normal ``noise`` (B, C, h, w), decode."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(noise)), posterior

    def blocks(self) -> list[nn.Module]:
        """Return the blocks that hold nearly all parameters, in no order."""
        kinds = (ResnetBlock, AttentionBlock, Downsample, Upsample)
        return [module for module in self.modules() if isinstance(module, kinds)]


Resize = Literal["down", "up", "none"]


class Level(nn.Module):
    """ResNet blocks of one size, with the change of size that ends them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        num_layers: ResNet blocks.
        norm_groups: Groups of the group norms.
        attends: Whether self-attention follows each block.
        resize: Halve or double the size at the end, or leave it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        norm_groups: int,
        attends: bool,
        resize: Resize,
    ) -> None:
        super().__init__()
        ins = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(i, out_channels, None, norm_groups, 1e-6) for i in ins])
        attentions = [AttentionBlock(out_channels, norm_groups) for _ in ins] if attends else None
        self.attentions = nn.ModuleList(attentions) if attentions else None
        down = [Downsample(out_channels, symmetric=False)] if resize == "down" else None
        up = [Upsample(out_channels)] if resize == "up" else None
        self.downsamplers = nn.ModuleList(down) if down else None
        self.upsamplers = nn.ModuleList(up) if up else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h', w')."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[i](x)
        for resize in self.downsamplers or self.upsamplers or ():
            x = resize(x)
        return x


class Middle(nn.Module):
    """ResNet block, self-attention, ResNet block at the coarsest size."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, None, norm_groups, 1e-6) for _ in "ab"])
        self.attentions = nn.ModuleList([AttentionBlock(channels, norm_groups)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) to moments (B, out_channels, H / factor, W / factor).

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the result: twice the latent's.
        channels: Channels of each level, finest first.
        num_layers: ResNet blocks per level.
        norm_groups: Groups of the group norms.
        attends: Whether each level has self-attention, finest first.
        patch_size: Pixels along a side of what makes one position of the finest level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: list[int],
        num_layers: int,
        norm_groups: int,
        attends: list[bool],
        patch_size: int,
    ) -> None:
        super().__init__()
        self.conv_in = conv_in(in_channels, channels[0], patch_size)
        self.down_blocks = nn.ModuleList()
        resizes: list[Resize] = ["down" for _ in channels[1:]]
        resizes.append("none")
        befores = [channels[0], *channels[:-1]]
        for before, width, attend, resize in zip(befores, channels, attends, resizes, strict=True):
            self.down_blocks.append(Level(before, width, num_layers, norm_groups, attend, resize))
        self.mid_block = Middle(channels[-1], norm_groups)
        self.conv_norm_out = GroupNorm(norm_groups, channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, h, w)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent (B, in_channels, h, w) to image (B, out_channels, H, W).

    Args:
        in_channels: Channels of the latent.
        out_channels: Channels of the image.
        channels: Channels of each level, finest first.
        num_layers: ResNet blocks per level of the encoder; here one more.
        norm_groups: Groups of the group norms.
        attends: Whether each level has self-attention, finest first.
        patch_size: Pixels along a side of what makes one position of the finest level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: list[int],
        num_layers: int,
        norm_groups: int,
        attends: list[bool],
        patch_size: int,
    ) -> None:
        super().__init__()
        coarse_first = channels[::-1]
        self.conv_in = nn.Conv2d(in_channels, coarse_first[0], 3, padding=1)
        self.mid_block = Middle(coarse_first[0], norm_groups)
        self.up_blocks = nn.ModuleList()
        resizes: list[Resize] = ["up" for _ in channels[1:]]
        resizes.append("none")
        befores = [coarse_first[0], *coarse_first[:-1]]
        for before, width, attend, resize in zip(befores, coarse_first, attends[::-1], resizes, strict=True):
            self.up_blocks.append(Level(before, width, num_layers + 1, norm_groups, attend, resize))
        self.conv_norm_out = GroupNorm(norm_groups, channels[0], eps=1e-6)
        self.conv_out = conv_out(channels[0], out_channels, patch_size)

    def hidden(self, z: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to the input of the last layer, (B, channels[0], H, W)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return F.silu(self.conv_norm_out(x))

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, H, W)."""
        return self.conv_out(self.hidden(z))
