"""A text-to-image model in pieces: what every file format of it comes down to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.io.weights import check
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.text import TextTower
from ldm.nets.unet import UNet
from ldm.types import DenoiserDims


@dataclass(frozen=True)
class Network:
    """A network of ours, not built.

    Args:
        arguments: Plain values that its class is called with.
        weights: Its state dict.
    """

    arguments: dict[str, Any]
    weights: dict[str, Tensor]

    def float(self) -> Network:
        """Widen the weights to float32."""
        return replace(self, weights={name: tensor.float() for name, tensor in self.weights.items()})

    def check(self, build: Callable[..., nn.Module], name: str) -> Network:
        """Check that the weights have the names and shapes that the arguments ask for.

        Args:
            build: Class of the network.
            name: What messages call it: its file.

        Raises:
            ValueError: If they have not.
        """
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in build(**self.arguments).state_dict().items()}
        check(self.weights, shapes, name)
        return self


@dataclass(frozen=True)
class Latents:
    """Normalisation of latents: (z - mean) / std has deviation about 1.

    Args:
        mean: (C,) float32.
        std: (C,) float32, positive.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Process:
    """Diffusion process and sampler of a U-Net, in the form of configurations.

    Args:
        schedule: ``{"class_path", "init_args"}`` of a ``Schedule``.
        prediction: The same of a ``Prediction``.
        sampler: The same of a ``Sampler``.
    """

    schedule: dict[str, Any]
    prediction: dict[str, Any]
    sampler: dict[str, Any]


@dataclass(frozen=True)
class TextToImage:
    """Stable Diffusion's pieces, in our names.

    Args:
        unet: Arguments of ``UNet`` but its widths, which the weights tell.
        autoencoder: Of ``KLAutoencoder``.
        text: Of ``TextTower``.
        latents: How its latents are normalised.
        process: Schedule, prediction and sampler.
        image_size: Side of the images that it was trained on, in pixels; None if unknown.
    """

    unet: Network
    autoencoder: Network
    text: Network
    latents: Latents
    process: Process
    image_size: int | None

    @property
    def widths(self) -> DenoiserDims:
        """Widths of the U-Net; spatial channels are what the input has beyond the latent's."""
        channels = len(self.latents.mean)
        inputs = self.unet.weights["conv_in.weight"].shape[1]
        return DenoiserDims(channels, tokens=self.text.arguments["width"], spatial=inputs - channels)

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net takes a mask and the masked latent in addition to the noisy latent."""
        return self.widths.spatial > 0

    def check(self, names: Mapping[str, str]) -> TextToImage:
        """Check that all weights have the names and shapes that the arguments ask for.

        Args:
            names: What messages call "unet", "autoencoder" and "text": their files.

        Raises:
            ValueError: If they have not, or the U-Net has an input of another kind.
        """
        channels, spatial = len(self.latents.mean), self.widths.spatial
        if spatial not in (0, channels + 1):
            raise ValueError(
                f"{names['unet']}: the U-Net has {channels + spatial} input channels, expected {channels}, "
                f"or {2 * channels + 1} to inpaint"
            )
        self.unet.check(partial(UNet, self.widths), names["unet"])
        self.autoencoder.check(KLAutoencoder, names["autoencoder"])
        self.text.check(TextTower, names["text"])
        return self


def arguments(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete constructor arguments by the defaults of their class."""
    bound = inspect.signature(kind).bind_partial(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def autoencoder_network(net: KLAutoencoder, given: Mapping[str, Any]) -> Network:
    """Take an autoencoder apart.

    Args:
        net: The autoencoder.
        given: Arguments that it was built with; the others have their defaults.

    Raises:
        ValueError: If its first level has squares of pixels, a graph that no other program has.
    """
    found = arguments(KLAutoencoder, given)
    if (side := found.pop("patch_size")) != 1:
        raise ValueError(
            f"the autoencoder cannot be exported: net.patch_size is {side}, expected 1, as in others"
        )
    return Network(found, net.state_dict())
