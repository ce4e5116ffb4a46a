"""The spaces that diffusion happens in: latents of an autoencoder, or pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ldm.diffusion.guidance import clamped
from ldm.io import checkpoint as ckpt
from ldm.io.config import Configurable
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.frozen import Frozen
from ldm.types import Batch, Denoise


class LatentSpace(Configurable, nn.Module, ABC):
    """Maps images to latents with standard deviation close to 1, and back."""

    channels: int
    """C of a latent."""
    factor: int
    """Pixels per side of a latent's pixel."""
    image_size: int | None = None
    """Side of the images that the space was trained on; None if it takes any."""

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that ``encode`` reads in training, see ``ldm.types.ReadsFields``."""
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

    def constrain(self, denoise: Denoise) -> Denoise:
        """Keep estimates of x0 where the space can be; latents are unbounded."""
        return denoise

    def shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of a square image.

        Raises:
            ValueError: If the size is not a multiple of ``factor``.
        """
        if image_size % self.factor:
            raise ValueError(
                f"data.image_size={image_size} is not a multiple of the latent space's factor {self.factor}"
            )
        return self.channels, image_size // self.factor, image_size // self.factor

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that this space is built on, with their SHA-256."""
        return {}


class Pixels(LatentSpace):
    """Diffusion in pixel space: the identity."""

    channels = 3
    factor = 1

    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return the images."""
        return batch["image"]

    def constrain(self, denoise: Denoise) -> Denoise:
        """Clamp estimates of x0 to [-1, 1], as Ho et al. 2020 do in their sampler."""
        return clamped(denoise)

    def decode(self, latent: Tensor) -> Tensor:
        """Clamp to [-1, 1]."""
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
        net, state = ckpt.load_net(checkpoint, "autoencoder", KLAutoencoder)
        self.net = Frozen(net)
        self.channels, self.factor = net.latent_channels, net.factor
        for name in ("latent_mean", "latent_std"):
            # upstream values, like the frozen weights: not saved a second time
            self.register_buffer(name, state["state_dict"][name].view(1, -1, 1, 1).float(), persistent=False)
        if not torch.isfinite(self.latent_std).all():
            raise ValueError(
                f"checkpoint '{checkpoint}' has no measured latent scale: it was saved before the first "
                "validation of its run; train it further"
            )
        self.image_size = state.get("image_size")
        self._upstream = {str(checkpoint): ckpt.sha256(checkpoint)}

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Read latents where the shards hold them."""
        return ("latent",) if "latent" in stored else ("image",)

    @torch.no_grad()
    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        """Draw z from q(z | image) and normalise it with the measured mean and deviation."""
        if "latent" in batch:
            mean, std = batch["latent"].float().chunk(2, dim=1)
        else:
            posterior = self.net.module.encode(batch["image"])
            mean, std = posterior.mean.float(), posterior.std.float()
        return (mean + std * noise - self.latent_mean) / self.latent_std

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Undo the normalisation and decode, clamped to [-1, 1]."""
        z = latent.float() * self.latent_std + self.latent_mean
        return self.net.module.decode(z).float().clamp(-1.0, 1.0)

    @property
    def upstream(self) -> dict[str, str]:
        """The autoencoder's checkpoint and its SHA-256."""
        return self._upstream
