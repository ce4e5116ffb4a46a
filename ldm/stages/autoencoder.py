"""Stage one: the KL autoencoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ldm.losses.kl import KL
from ldm.losses.reconstruction import Reconstruction
from ldm.losses.term import LossTerm
from ldm.metrics.psnr import psnr
from ldm.nets.autoencoder import DiagonalGaussian, KLAutoencoder
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.stage import Stage
from ldm.types import Batch


class Autoencoder(Stage):
    """Trains L = sum of squared errors + kl_weight * KL (Kingma & Welling 2013; Rombach et al. 2021, Eq. 25).

    Every validation measures mean and standard deviation of the latents; the checkpoint holds them, and the
    optimizer steps by then, so that no later stage is configured with a scale.

    Loss terms get as outputs ``image``, the reconstruction (B, 3, H, W), and ``mean`` and ``log_var`` of
    q(z | image), (B, C, h, w).

    Args:
        net: The autoencoder.
        kl_weight: Weight of the KL divergence in nats against the squared error summed over an image.
        optimizer: Recipe of the parameters.
        losses: Further loss terms.
    """

    name = "autoencoder"
    generate_shows_input = True
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        net: KLAutoencoder,
        kl_weight: float = 1e-3,
        optimizer: Optimization | None = None,
        losses: Sequence[LossTerm] = (),
    ) -> None:
        super().__init__(optimizer or AdamW(), [Reconstruction(), KL(kl_weight), *losses])
        self.net = net
        self.higher_is_better["sampled_psnr"] = True
        unknown = torch.full((net.latent_channels,), float("nan"))
        self.register_buffer("latent_mean", unknown)
        self.register_buffer("latent_std", unknown.clone())
        self._moments = torch.zeros(2, net.latent_channels, dtype=torch.float64)
        self._count = 0
        self._measured_at = 0

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that training needs."""
        terms = cast(Sequence[LossTerm], self.terms)
        return tuple(dict.fromkeys(("image", *(field for term in terms for field in term.reads))))

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Reconstruct ``batch["image"]``; compute the loss, each of its terms, and the PSNR in dB.

        That is ``sampled_psnr``, of z drawn from q(z | image), and less than the ``psnr`` of metrics, which
        is of its mean.
        """
        image = batch["image"]
        posterior = self.net.encode(image)
        output = self.net.decode(posterior.sample(noise.like(posterior.mean)))
        if not self.training:
            self._measure(posterior)
        outputs = {"image": output, "mean": posterior.mean, "log_var": posterior.log_var}
        return {**self.sum_terms(batch, outputs), "sampled_psnr": psnr(output.detach(), image).mean()}

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

    @override
    def on_validation_epoch_end(self) -> None:
        sums = torch.cat([self._moments.flatten(), torch.tensor([float(self._count)])]).to(torch.float64)
        total = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        if self._count and isinstance(total, Tensor):
            first, second = (total[:-1] / total[-1]).view(2, -1).cpu()
            self.latent_mean.copy_(first)
            self.latent_std.copy_((second - first.square()).clamp_min(1e-12).sqrt())
            self._measured_at = self.progress.steps
        self._moments.zero_()
        self._count = 0

    @override
    def on_train_end(self) -> None:
        if self._measured_at != self.progress.steps:
            rank_zero_warn(
                f"the latent scale is not measured at step {self.progress.steps}: ldm.encode and diffusion "
                "will refuse these weights; validate at the end, see trainer.limit_val_batches"
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        scale = {"mean": self.latent_mean.tolist(), "std": self.latent_std.tolist()}
        checkpoint["latent"] = {**scale, "measured_at": self._measured_at}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # an ldm older than this one did not say when
        self._measured_at = checkpoint.get("latent", {}).get("measured_at", self.progress.steps)
