"""Stage one: the KL autoencoder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ldm.losses.terms import kl_to_standard_normal, psnr, squared_error
from ldm.nets.autoencoder import DiagonalGaussian, KLAutoencoder
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.stage import Stage
from ldm.types import Batch


class Autoencoder(Stage):
    """Trains L = sum of squared errors + kl_weight * KL (Kingma & Welling 2013; Rombach et al. 2021, Eq. 25).

    Every validation measures the mean and deviation of the latents; they travel with the
    checkpoint, so that no later stage has to be told a scale.

    Args:
        net: The autoencoder.
        kl_weight: Weight of the KL divergence in nats against the squared error summed over an image.
        optimizer: How the parameters are updated.
    """

    name = "autoencoder"
    generate_shows_input = True
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self, net: KLAutoencoder, kl_weight: float = 1e-3, optimizer: Optimization | None = None
    ) -> None:
        super().__init__(optimizer or AdamW())
        self.net = net
        self.kl_weight = kl_weight
        unknown = torch.full((net.latent_channels,), float("nan"))
        self.register_buffer("latent_mean", unknown)
        self.register_buffer("latent_std", unknown.clone())
        self._moments = torch.zeros(2, net.latent_channels, dtype=torch.float64)
        self._count = 0

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that training needs."""
        return ("image",)

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Reconstruct ``batch["image"]`` and compute loss, reconstruction, kl and psnr (dB)."""
        image = batch["image"]
        posterior = self.net.encode(image)
        output = self.net.decode(posterior.sample(noise.like(posterior.mean)))
        reconstruction = squared_error(output, image)
        kl = kl_to_standard_normal(posterior.mean, posterior.log_var)
        if not self.training:
            self._measure(posterior)
        return {
            "loss": (reconstruction + self.kl_weight * kl).mean(),
            "reconstruction": reconstruction.mean(),
            "kl": kl.mean(),
            "psnr": psnr(output.detach(), image).mean(),
        }

    @torch.no_grad()
    def generate(self, batch: Batch, seed: int) -> Tensor:
        """Reconstruct from the posterior mean; ``seed`` has no effect."""
        return self.net.decode(self.net.encode(batch["image"]).mean).float().clamp(-1.0, 1.0)

    def _measure(self, posterior: DiagonalGaussian) -> None:
        mean, variance = posterior.mean.cpu().double(), posterior.std.cpu().double().square()
        # E[z] and E[z^2] of z ~ q(z | x), exactly rather than from one draw
        self._moments[0] += mean.sum((0, 2, 3))
        self._moments[1] += (mean.square() + variance).sum((0, 2, 3))
        self._count += mean[:, 0].numel()

    def on_validation_epoch_end(self) -> None:
        """Set the latent mean and deviation of each channel from the validation set."""
        sums = torch.cat([self._moments.flatten(), torch.tensor([float(self._count)])]).to(torch.float64)
        total = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        if self._count and isinstance(total, Tensor):
            first, second = (total[:-1] / total[-1]).view(2, -1).cpu()
            self.latent_mean.copy_(first)
            self.latent_std.copy_((second - first.square()).clamp_min(1e-12).sqrt())
        self._moments.zero_()
        self._count = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which statistics the latents have, in numbers that a person can read."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["latent"] = {"mean": self.latent_mean.tolist(), "std": self.latent_std.tolist()}
