"""Stage one: the KL autoencoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ldm.latents.moments import LatentMoments, statistics
from ldm.losses.balance import LastLayer
from ldm.losses.kl import KL
from ldm.losses.l2 import L2
from ldm.losses.term import LossTerm
from ldm.metrics.psnr import psnr
from ldm.nets.autoencoder import DECODER, ENCODER, KLAutoencoder, check_size
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.stage import Stage
from ldm.types import Batch, kind_of_channels

HALVES: dict[str, tuple[str, ...]] = {"encoder": ENCODER, "decoder": DECODER}


class Autoencoder(Stage):
    """Trains an autoencoder against a discriminator: Rombach et al. 2021 (arXiv:2112.10752), Eq. 25.

    min over encoder and decoder, max over D of L_rec - L_adv + ln D(x) + L_reg. L_rec is ``reconstruction``,
    with LPIPS where ``losses`` has it, L_reg the KL divergence times ``kl_weight``; L_adv and ln D(x) are the
    losses of the two players of ``Adversarial``, where ``losses`` has it. By default ``losses`` is empty, and
    the objective is the sum of squared errors + kl_weight * KL (Kingma & Welling 2013).

    Every validation measures mean and standard deviation of the latents; the checkpoint holds them, and the
    optimizer steps by then, so that no later stage is configured with a scale. It logs the extremes over
    channels, ``val/latent_mean_max`` (of |mean|), ``latent_std_min``, ``latent_std_max``,
    ``latent_kurtosis_max`` (3 is normal), and ``val/dead_channels``, the share that ignores the image.

    Loss terms get as outputs ``image``, the reconstruction (B, 3, H, W), and ``mean`` and ``log_var`` of
    q(z | image), (B, C, h, w).

    Args:
        net: The autoencoder.
        kl_weight: Weight of the KL divergence in nats, against errors summed over an image unless
            ``reconstruction`` says otherwise.
        optimizer: Recipe of the parameters.
        losses: Further loss terms.
        reconstruction: Error of the reconstruction; squared and summed unless given.
        frozen: What is not trained: "encoder", to fine-tune a decoder for the same latents, or "decoder".

    Raises:
        ValueError: If nothing is left to train.
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
        reconstruction: LossTerm | None = None,
        frozen: Sequence[Literal["encoder", "decoder"]] = (),
    ) -> None:
        super().__init__(optimizer or AdamW(), [reconstruction or L2(), KL(kl_weight), *losses])
        if set(frozen) == HALVES.keys():
            raise ValueError(
                "model.frozen: got encoder and decoder, expected one of them: nothing is left to train"
            )
        self.net, self.image_channels = net, net.image_channels
        self.image_kind = kind_of_channels(net.image_channels)
        for half in frozen:
            for module in HALVES[half]:
                getattr(net, module).requires_grad_(False)
        self.encoder_trains = "encoder" not in frozen
        self.higher_is_better["sampled_psnr"] = True
        unknown = torch.full((net.latent_channels,), float("nan"))
        self.register_buffer("latent_mean", unknown)
        self.register_buffer("latent_std", unknown.clone())
        self._moments = LatentMoments(net.latent_channels)
        self._measured_at = 0

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that training needs."""
        return tuple(dict.fromkeys(("image", *(field for term in self.loss_terms for field in term.reads))))

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Reconstruct ``batch["image"]``; compute the loss, each of its terms, and the PSNR in dB.

        That is ``sampled_psnr``, of z drawn from q(z | image), and less than the ``psnr`` of metrics, which
        is of its mean.
        """
        image = batch["image"]
        with torch.set_grad_enabled(self.encoder_trains and torch.is_grad_enabled()):
            posterior = self.net.encode(image)
        last = LastLayer(self.net.last_layer, self.net.hidden(posterior.sample(noise.like(posterior.mean))))
        output = last.layer(last.hidden)
        if not self.training:
            self._moments.add(posterior.mean, posterior.std)
        outputs = {"image": output, "mean": posterior.mean, "log_var": posterior.log_var}
        return {**self.sum_terms(batch, outputs, last), "sampled_psnr": psnr(output.detach(), image).mean()}

    @torch.no_grad()
    def generate(self, batch: Batch, seed: int) -> Tensor:
        """Reconstruct from the posterior mean; ``seed`` has no effect."""
        return self.net.decode(self.net.encode(batch["image"]).mean).float().clamp(-1.0, 1.0)

    @override
    def validate_shards(
        self, fields: Collection[str], train: str | list[str], val: str | list[str], image_size: int
    ) -> None:
        super().validate_shards(fields, train, val, image_size)
        self.validate_sizes([(image_size, image_size)])

    def validate_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that images can be halved often enough, and are large enough for each loss term."""
        for height, width in sizes:
            check_size(self.net.factor, height, width)
            for term in self.loss_terms:
                term.validate_size(min(height, width))

    @override
    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._moments.packed().to(self.device), reduce_op="sum")
        if isinstance(total, Tensor) and total[-1] > 0:  # of all processes: one may have had no batch
            found = statistics(total.cpu())
            if self.encoder_trains or not self.latent_std.isfinite().all():  # else latents stay as they are
                self.latent_mean.copy_(found.mean)
                self.latent_std.copy_(found.std)
            self._measured_at = self.progress.steps
            values = {f"val/{name}": value for name, value in found.summary().items()}
            self.log_dict(values, sync_dist=True, reduce_fx="max")  # equal on all processes
        self._moments.reset()

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
