"""Stage three: conditional diffusion, in latents or in pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.conditioners.base import Conditioner
from ldm.diffusion.guidance import Guidance, Unguided
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.sampler import Sampler
from ldm.io.upstream import MODEL_FOLDERS, check_model_folders
from ldm.latents.manifest import check_text
from ldm.latents.space import LatentSpace
from ldm.lightning_internals import trainer_of
from ldm.losses.term import LossTerm
from ldm.nets.routing import RoutesTokens
from ldm.optim.recipes import AdamW, Optimization
from ldm.rng import SampleNoise
from ldm.stages.draws import Draws
from ldm.stages.terms import bind_terms
from ldm.types import Batch, DenoiserDims, ImageKind

QUARTERS = 4
"""Parts of the timesteps, from almost clean to noise, that validation reports the loss of."""


class Diffusion(Draws):
    """Trains a denoiser by Algorithm 1 of Ho et al. 2020, conditioned as in Rombach et al. 2021, Eq. 3.

    Args:
        latents: Space that diffusion happens in.
        conditioner: Its conditioner.
        denoiser: Builds the network, a ``Denoiser``, from the channels and widths that the other two say of
            themselves.
        objective: Noise schedule, prediction and weighting.
        sampler: How validation and ``ldm.sample`` draw images, by default.
        guidance: How they combine the conditional and the unconditional prediction.
        optimizer: How the parameters are updated.
        losses: Further loss terms, in training alone, e.g. ``Alignment``. They get the hidden states of the
            denoiser that they name, and the clean image as ``image``.
    """

    name = "diffusion"
    generate_shows_input = False

    def __init__(
        self,
        latents: LatentSpace,
        conditioner: Conditioner,
        denoiser: Callable[[DenoiserDims], nn.Module],
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        optimizer: Optimization | None = None,
        losses: Sequence[LossTerm] = (),
    ) -> None:
        super().__init__(optimizer or AdamW(), losses)
        self.higher_is_better |= {f"loss_quarter_{i + 1}": False for i in range(QUARTERS)}
        self.latents = latents
        self.image_size, self.image_kind = latents.image_size, latents.image_kind
        self.image_channels = latents.image_channels
        self.conditioner = conditioner
        conditioner.bind(latents)
        self.objective = objective or Objective()
        dims = DenoiserDims(
            latents.channels,
            conditioner.token_width,
            conditioner.vector_width,
            conditioner.spatial_channels,
            self.objective.outputs * latents.channels,
            self.objective.times,
        )
        self.denoiser = denoiser(dims)
        self._hidden = bind_terms(losses, self.denoiser, dims)
        self.context_length = conditioner.context_length
        self.sampler = sampler or DDIM()
        if self.sampler.times > self.objective.times:
            raise ValueError(
                f"model.sampler: {type(self.sampler).__name__} needs the objective MeanFlow, got "
                f"{type(self.objective).__name__}"
            )
        self.guidance = guidance or Unguided()

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of a batch that the latent space, the conditioner and the loss terms read."""
        fields = (*self.latents.reads(stored), *self.conditioner.reads_stored(stored))
        return tuple(dict.fromkeys((*fields, *(name for term in self.loss_terms for name in term.reads))))

    @override
    def validate_shards(
        self, fields: Collection[str], train: str | list[str], val: str | list[str], image_size: int
    ) -> None:
        super().validate_shards(fields, train, val, image_size)
        self._check_sizes("data.image_size", [(image_size, image_size)])
        check_text(fields, train, val, self.conditioner.text_encoder)

    @override
    def validate_images(self, kind: ImageKind) -> None:
        super().validate_images(kind)
        if (trained := self.latents.image_kind) is not None and trained.bits != kind.bits:
            raise ValueError(
                f"data.image: got {kind}, but the autoencoder of model.latents was trained on {trained}: "
                "leave data.image out"
            )

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes of each field that the conditioner reads classes of."""
        return self.conditioner.classes

    def validate_batch(self, batch: Batch) -> None:
        """Check that the conditioner knows every class of a batch, see ``ValidatesBatch``."""
        self.conditioner.check_values(batch)

    def validate_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check that heights and widths of images are multiples of what the networks need."""
        self._check_sizes("data.buckets.multiple", sizes)

    def _check_sizes(self, key: str, sizes: Sequence[tuple[int, int]]) -> None:
        for height, width in sizes:
            if height % self.multiple or width % self.multiple:
                raise ValueError(
                    f"{key}: some images are {width}x{height}, expected multiples of {self.multiple}: of the "
                    f"latent space's {self.latents.factor} times {self.multiple // self.latents.factor} of "
                    "the denoiser (its patches or levels)"
                )

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Regress the objective's target at random timesteps; "denoising" is the loss without its terms."""
        found = {"loss": self._regress(batch, noise)[1].mean(), **self.conditioner.truncated(batch)}
        if self._hidden is None or not self.training:
            return found
        hidden = self._hidden.take(*batch["image"].shape[-2:])
        terms = self.sum_terms(batch, {"image": batch["image"], **hidden})
        return {**found, **terms, "loss": found["loss"] + terms["loss"], "denoising": found["loss"]}

    def means(self, batch: Batch, noise: SampleNoise) -> dict[str, tuple[Tensor, int]]:
        """Average the loss over all samples, and over those in each quarter of the timesteps."""
        t, loss = self._regress(batch, noise)
        means = {"loss": (loss.mean(), len(loss))}
        first = t if t.ndim == 1 else t[:, 0]
        quarter = first * QUARTERS // self.objective.schedule.num_steps
        for i in range(QUARTERS):
            inside = loss[quarter == i]
            # one without samples in this batch is logged all the same: processes must agree on the names
            means[f"loss_quarter_{i + 1}"] = (inside.sum() / max(1, len(inside)), len(inside))
        return means

    def _regress(self, batch: Batch, noise: SampleNoise) -> tuple[Tensor, Tensor]:
        """Return timesteps of the samples, (B,) or (B, 2), and their losses, (B,)."""
        cond = self.conditioner.dropped(batch, noise) if self.training else self.conditioner(batch)
        latent = self._encode(batch, noise)
        t, eps = self.objective.draw(latent, noise, self._positions(len(latent)))
        if self.training and isinstance(self.denoiser, RoutesTokens):
            self.denoiser.draw_route(latent, noise.like)
        loss = self.objective.training_loss if self.training else self.objective.loss
        return t, loss(self.network(cond), latent, eps, t)

    def _positions(self, count: int) -> Tensor | None:
        """Positions of the samples in the training stream: rank r of w has r, r + w, ... of each batch's."""
        if not self.training:
            return None
        if (trainer := trainer_of(self)) is None:
            return self.progress.samples + torch.arange(count)
        return self.batch_start + trainer.global_rank + trainer.world_size * torch.arange(count)

    def _encode(self, batch: Batch, noise: SampleNoise) -> Tensor:
        if "latent" in batch:
            mean = batch["latent"].chunk(2, dim=1)[0]
        else:
            image = batch["image"]
            mean = image.new_empty(len(image), *self.latents.shape(*image.shape[-2:]))
        return self.latents.encode(batch, noise.like(mean))

    @property
    def multiple(self) -> int:
        """What heights and widths of images are multiples of, for latent space and denoiser."""
        return self.latents.factor * int(getattr(self.denoiser, "factor", 1))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[MODEL_FOLDERS] = self.conditioner.model_folders

    @override
    def check_upstream(self, checkpoint: dict[str, Any]) -> None:
        super().check_upstream(checkpoint)
        check_model_folders(self.conditioner.model_folders, checkpoint)

    def upstream(self) -> dict[str, str]:
        """Checkpoints of the latent space, the conditioner and the guidance, with their SHA-256."""
        return {**self.latents.upstream, **self.conditioner.upstream, **self.guidance.upstream}

    def latent_sources(self) -> dict[str, str]:
        """Checkpoint of the latent space, with its SHA-256; in pixels all, none of which fits."""
        return self.latents.upstream or self.upstream()

    def latent_encoder(self) -> str | None:
        """Hash of the encoder and scale of the latent space."""
        return self.latents.encoder_sha256
