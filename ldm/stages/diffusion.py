"""Stage three: conditional diffusion, in latents or in pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion.guidance import Guidance, Unguided
from ldm.diffusion.noise import SampleNoise
from ldm.diffusion.objective import Objective
from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.sampler import Sampler
from ldm.latents import LatentSpace
from ldm.stages.optimization import AdamW, Optimization
from ldm.stages.stage import Stage
from ldm.types import Batch, Cond, Denoise, Widths


class Diffusion(Stage):
    """Trains a denoiser by Algorithm 1 of Ho et al. 2020, conditioned as in Rombach et al. 2021, Eq. 3.

    Args:
        latents: Space that diffusion happens in.
        conditioner: What conditions it.
        denoiser: Network; called with the channels and widths that the other two say of themselves.
        objective: Noise schedule, prediction and weighting.
        sampler: How validation and ``ldm.sample`` draw pictures, unless told otherwise.
        guidance: How they combine the conditional and the unconditional prediction.
        optimizer: How the parameters are updated.
    """

    name = "diffusion"
    generate_shows_input = False

    def __init__(
        self,
        latents: LatentSpace,
        conditioner: Conditioner,
        denoiser: Callable[[Widths], nn.Module],
        objective: Objective | None = None,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        optimizer: Optimization | None = None,
    ) -> None:
        super().__init__(optimizer or AdamW())
        self.latents = latents
        self.conditioner = conditioner
        conditioner.bind(latents)
        self.denoiser = denoiser(
            Widths(
                latents.channels,
                conditioner.token_width,
                conditioner.vector_width,
                conditioner.spatial_channels,
            )
        )
        self.objective = objective or Objective()
        self.sampler = sampler or DDIM()
        self.guidance = guidance or Unguided()

    def check(self, batch: Batch) -> None:
        """Check that the conditioner knows every class of a batch that is still on the CPU.

        Raises:
            ValueError: If it does not.
        """
        self.conditioner.check_values(batch)

    def losses(self, batch: Batch, noise: SampleNoise) -> dict[str, Tensor]:
        """Regress the objective's target at random timesteps."""
        cond = self.conditioner.dropped(batch, noise) if self.training else self.conditioner(batch)
        latent = self._encode(batch, noise)
        t, eps = self.objective.draw(latent, noise)
        loss = self.objective.loss(lambda x, t: self.denoiser(x, t, cond), latent, eps, t)
        return {"loss": loss.mean()}

    def _encode(self, batch: Batch, noise: SampleNoise) -> Tensor:
        if "latent" in batch:
            mean = batch["latent"].chunk(2, dim=1)[0]
        else:
            image = batch["image"]
            mean = image.new_empty(len(image), *self.latents.shape(image.shape[-1]))
        return self.latents.encode(batch, noise.like(mean))

    @torch.no_grad()
    def generate(self, batch: Batch, seed: int) -> Tensor:
        """Draw one picture per sample of ``batch``, conditioned on it.

        The size is that of ``batch["image"]``, or else the one trained on.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].
        """
        size = batch["image"].shape[-1] if "image" in batch else self.image_size
        if size is None:
            raise ValueError("the picture size is unknown: give batch['image'] or train first")
        count = len(batch["key"])
        noise = SampleNoise(seed, batch["key"])
        x = noise.like(torch.empty(count, *self.latents.shape(size), device=self.device))
        denoise = self.guidance(
            self.denoise(self.conditioner(batch)), self.denoise(self.conditioner.null(batch))
        )
        denoise = self.latents.constrain(denoise)
        return self.latents.decode(self.sampler(denoise, self.objective.schedule, x, noise.like))

    def denoise(self, cond: Cond) -> Denoise:
        """Bind a condition: a function from (x_t, t) to x0_hat."""
        return self.objective.denoiser(lambda x, t: self.denoiser(x, t, cond))

    def upstream(self) -> dict[str, str]:
        """Checkpoints of the latent space and the conditioner, with their SHA-256."""
        return {**self.latents.upstream, **self.conditioner.upstream}
