"""Spaces of diffusion: latents of an autoencoder, or pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.diffusion.guidance import clamped
from ldm.io.checkpoint import Checkpoint, saved_kind
from ldm.io.config import Configurable
from ldm.io.upstream import open_upstream
from ldm.io.weights import tensors_sha256
from ldm.nets.autoencoder import ENCODER, KLAutoencoder
from ldm.nets.frozen import Frozen
from ldm.types import Batch, Denoise, ImageKind, kind_of_channels


class LatentSpace(Configurable, nn.Module, ABC):
    """Maps images to latents with standard deviation close to 1, and back."""

    channels: int
    """C of a latent."""
    factor: int
    """Pixels per side of a latent's pixel."""
    image_channels: int = 3
    """Channels of the images."""
    image_size: int | None = None
    """Side of the images that the space was trained on; None if it takes any."""
    image_kind: ImageKind | None = None
    """Channels and bits of the images that the space was trained on; None if it takes any bits."""

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that ``encode`` reads in training, see ``ReadsFields``."""
        return ("image",)

    @abstractmethod
    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        """Map a batch to latents.

        Args:
            batch: With "image" (B, 3, H, W) in [-1, 1], or with "latent" as ``ldm.encode`` wrote it.
            noise: (B, C, h, w) standard normal, draws z = mu + sigma * eps where the space is random.

        Returns:
            (B, C, h, w) float32.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Map latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]."""

    def frozen_blocks(self) -> list[nn.Module]:
        """Return the blocks of the network that encodes and decodes, which is not trained; none without."""
        return []

    def constrain(self, denoise: Denoise) -> Denoise:
        """Constrain estimates of x0 to the range of the space; latents are unbounded."""
        return denoise

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of an image.

        Raises:
            ValueError: If a side is not a multiple of ``factor``.
        """
        for side in (height, width):
            if side % self.factor:
                raise ValueError(
                    f"data.image_size={side} is not a multiple of the latent space's factor {self.factor}"
                )
        return self.channels, height // self.factor, width // self.factor

    @property
    def encoder_sha256(self) -> str | None:
        """Hash of what decides the latents, see ``encoder_sha256``; None where nothing was trained."""
        return None

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that this space is built on, with their SHA-256."""
        return {}


class Pixels(LatentSpace):
    """Diffusion in pixel space: the identity.

    Args:
        image_channels: Channels of the images; None takes ``data.image.channels``, without data 3.
    """

    factor = 1

    def __init__(self, image_channels: int | None = None) -> None:
        super().__init__()
        self.channels = self.image_channels = image_channels or 3

    @override
    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        return batch["image"]

    @override
    def constrain(self, denoise: Denoise) -> Denoise:
        return clamped(denoise)  # as Ho et al. 2020 do in their sampler

    @override
    def decode(self, latent: Tensor) -> Tensor:
        return latent.clamp(-1.0, 1.0)


class AutoencoderLatents(LatentSpace):
    """Latents of a trained autoencoder, shifted and scaled by the statistics measured with it.

    Args:
        checkpoint: Checkpoint or run folder of an autoencoder stage.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        found = open_upstream(checkpoint, "autoencoder", encoder_sha256)
        net = found.load_net(KLAutoencoder)
        self.net, self.net_config = Frozen(net), found.net_config
        self.channels, self.factor = net.latent_channels, net.factor
        for name, value in zip(("latent_mean", "latent_std"), latent_scale(found), strict=True):
            # upstream values, like the frozen weights: not saved a second time
            self.register_buffer(name, value.clone().view(1, -1, 1, 1), persistent=False)
        self.image_size, self.image_channels = found.state.get("image_size"), net.image_channels
        self.image_kind = saved_kind(found.state) or kind_of_channels(net.image_channels)
        self._upstream = {checkpoint: found.sha256}
        self._encoder_sha256 = encoder_sha256(found)

    @override
    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        return ("latent",) if "latent" in stored else ("image",)

    @override
    @torch.no_grad()
    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        if "latent" in batch:
            mean, std = batch["latent"].float().chunk(2, dim=1)
        else:
            posterior = self.net.module.encode(batch["image"])
            mean, std = posterior.mean.float(), posterior.std.float()
        return (mean + std * noise - self.latent_mean) / self.latent_std

    @override
    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        z = latent.float() * self.latent_std + self.latent_mean
        return self.net.module.decode(z).float().clamp(-1.0, 1.0)

    @override
    def frozen_blocks(self) -> list[nn.Module]:
        return self.net.module.blocks()

    @property
    @override
    def encoder_sha256(self) -> str:
        return self._encoder_sha256

    @property
    @override
    def upstream(self) -> dict[str, str]:
        return self._upstream


def encoder_sha256(checkpoint: Checkpoint) -> str:
    """Hash what decides the latents of an autoencoder: its encoder, and their mean and standard deviation.

    Autoencoders that differ in their decoders alone, as after fine-tuning one, share it.
    """
    deciding = ("latent_mean", "latent_std", *(f"net.{name}." for name in ENCODER))
    weights = checkpoint.state["state_dict"]
    return tensors_sha256({name: value for name, value in weights.items() if name.startswith(deciding)})


def latent_scale(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Read the mean and standard deviation of an autoencoder's latents, (C,) each.

    Raises:
        ValueError: If they were not measured, or with other weights than these.
    """
    mean, std = (checkpoint.state["state_dict"][name].float() for name in ("latent_mean", "latent_std"))
    steps = checkpoint.progress.steps
    measured_at = checkpoint.state.get("latent", {}).get("measured_at", steps)
    is_measured = bool(torch.isfinite(std).all())
    if is_measured and measured_at == steps:
        return mean, std
    found = f"that of step {measured_at}" if is_measured else "none"
    raise ValueError(
        f"checkpoint '{checkpoint.file}' has no measured latent scale for its weights of step {steps}, found "
        f"{found}: a run validates at its end, repeat its command, with trainer.limit_val_batches above 0"
    )
