"""Discriminators: networks that tell real images from reconstructed ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ldm.io.config import Configurable
from ldm.nets.feature_maps import FeatureMaps
from ldm.nets.layers import GroupNorm

MAX_WIDTH = 8
"""Most channels of a PatchGAN, as a multiple of the first layer's."""


class Discriminator(Configurable, nn.Module, ABC):
    """Maps images to logits, each sample by itself: positive ones mean real."""

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to logits (B, ...), any number for each image."""

    def validate_size(self, size: int) -> None:
        """Check the side of the images before training.

        Raises:
            ValueError: If it is too small.
        """

    def prepare(self) -> None:
        """Read files that only training needs."""

    def on_step(self) -> None:
        """Take over what forward passes have found out, once an optimizer step is complete."""
        for module in self.modules():
            if isinstance(module, SpectralConv2d):
                module.on_step()


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight is divided by its largest singular value.

    Miyato et al. 2018 (arXiv:1802.05957): the weight is taken for a matrix (out, in * height * width). One
    power iteration per training step follows the value. The vector moves on when the step is complete, so
    that a step that is begun again is the same.
    """

    u: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, size, stride, padding)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))
        self._next: Tensor | None = None

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1).float()
        with torch.no_grad():  # sums and not matmul: autocast would round them
            v = F.normalize((weight * self.u[:, None]).sum(0), dim=0)
            u = F.normalize((weight * v).sum(1), dim=0)
        self._next = u if self.training else None
        sigma = ((weight * v).sum(1) * u).sum()
        return self._conv_forward(x, self.weight / sigma, self.bias)

    @torch.no_grad()
    def on_step(self) -> None:
        """Keep the vector that the last forward pass found, unless the step was skipped for it."""
        if self._next is not None:
            self.u.copy_(torch.where(torch.isfinite(self._next).all(), self._next, self.u))
        self._next = None


class PatchGAN(Discriminator):
    """Judges overlapping patches of an image by convolutions of 4x4 (Isola et al. 2017, arXiv:1611.07004).

    ``num_layers`` convolutions of stride 2 and two of stride 1: 3 layers see patches of 70 pixels. Without
    layers it judges single pixels by convolutions of 1x1 (their PixelGAN). Graph and parameter names are
    those of taming-transformers, with a norm that does not depend on the batch in the place of batch norm.

    Args:
        channels: Channels of the first layer; each further one has twice as many, 8 times at most.
        num_layers: Convolutions of stride 2.
        norm: "group" norm; "spectral" norm of the weights of all layers (Miyato et al. 2018); or "none".
        norm_groups: Groups of the group norms; divides ``channels``.
        image_channels: Channels of the image; None takes ``data.image.channels``, without data 3.

    Raises:
        ValueError: If there are less than 0 layers, or the groups do not divide the channels.
    """

    def __init__(
        self,
        channels: int = 64,
        num_layers: int = 3,
        norm: Literal["group", "spectral", "none"] = "group",
        norm_groups: int = 32,
        image_channels: int | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"discriminator.num_layers: got {num_layers}, expected at least 0")
        if norm == "group" and 2 * channels % norm_groups:
            raise ValueError(
                f"discriminator.norm_groups: {norm_groups} does not divide a layer's width {2 * channels}"
            )
        self.num_layers, self.norm, self.norm_groups = num_layers, norm, norm_groups
        self.image_channels = image_channels or 3
        size, padding = (4, 1) if num_layers else (1, 0)
        widths = [channels * min(2**i, MAX_WIDTH) for i in range(max(num_layers, 1) + 1)]
        strides = [2] * num_layers + [1] if num_layers else [1, 1]
        layers = [self._conv(self.image_channels, channels, size, strides[0], padding), nn.LeakyReLU(0.2)]
        for before, width, stride in zip(widths, widths[1:], strides[1:], strict=False):
            layers += [self._conv(before, width, size, stride, padding, norm != "group"), self._norm(width)]
            layers += [nn.LeakyReLU(0.2)]
        layers.append(self._conv(widths[-1], 1, size, 1, padding))
        self.main = nn.Sequential(*layers)

    @override
    def forward(self, image: Tensor) -> Tensor:
        self.validate_size(min(image.shape[2:]))
        if image.shape[1] != self.image_channels:
            raise ValueError(
                f"discriminator.image_channels: got {self.image_channels}, but images have {image.shape[1]}"
            )
        logits: Tensor = self.main(image)
        return logits

    @override
    def validate_size(self, size: int) -> None:
        if self.num_layers and size >> self.num_layers < 3:
            fits = max(0, (size // 3).bit_length() - 1)
            raise ValueError(
                f"discriminator.num_layers: got {self.num_layers}, too deep for images of {size} pixels, "
                f"expected at most {fits}"
            )

    def _conv(
        self, before: int, width: int, size: int, stride: int, padding: int, bias: bool = True
    ) -> nn.Conv2d:
        if self.norm == "spectral":
            conv: nn.Conv2d = SpectralConv2d(before, width, size, stride, padding)
        else:
            conv = nn.Conv2d(before, width, size, stride, padding, bias=bias)
        nn.init.normal_(conv.weight, 0.0, 0.02)
        return conv

    def _norm(self, width: int) -> nn.Module:
        return GroupNorm(self.norm_groups, width) if self.norm == "group" else nn.Identity()


class FeatureDiscriminator(Discriminator):
    """Judges features of a frozen network, by two layers for each position of each map.

    Sauer et al. 2021 (arXiv:2111.01007) and later work: features that are given already make a discriminator
    of few weights, which sees semantics first. The weights have spectral norm. The network is built when
    training starts: a trained autoencoder does not need it.

    Args:
        extractor: A network with ``image_features(image)``: CLIPTower (one's own CLIP), OpenCLIP, DINOv2.
        layers: Modules of it, with the channels of what they put out, such as ``{model.visual.layer2: 128}``.
        channels: Channels between the two layers.
    """

    def __init__(
        self, extractor: Callable[[], nn.Module], layers: dict[str, int], channels: int = 64
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("discriminator.layers: got none, expected names of modules with their channels")
        self.extractor, self.layers = extractor, dict(layers)
        self.heads = nn.ModuleList(
            nn.Sequential(
                SpectralConv2d(width, channels, 1, 1, 0),
                nn.LeakyReLU(0.2),
                SpectralConv2d(channels, 1, 1, 1, 0),
            )
            for width in layers.values()
        )
        self._maps: FeatureMaps | None = None

    @override
    def prepare(self) -> None:
        if self._maps is None:
            self._maps = FeatureMaps(self.extractor, list(self.layers))

    @override
    def forward(self, image: Tensor) -> Tensor:
        self.prepare()
        assert self._maps is not None
        logits = []
        for head, features, (name, width) in zip(
            self.heads, self._maps(image), self.layers.items(), strict=True
        ):
            if features.shape[1] != width:
                raise ValueError(
                    f"discriminator.layers: {name} has {features.shape[1]} channels, got {width}"
                )
            logits.append(head(features[..., None]).flatten(1))
        return torch.cat(logits, dim=1)
