"""What a trained diffusion model draws: images from noise, and images redrawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.diffusion.guidance import Guidance, inpainted
from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.samplers.sampler import Sampler
from ldm.diffusion.samplers.spacing import Step
from ldm.latents.space import LatentSpace
from ldm.nets.frozen import Frozen
from ldm.rng import SampleNoise
from ldm.stage_protocols import blocks_of
from ldm.stages.estimates import Estimates
from ldm.stages.stage import Stage
from ldm.types import Batch, Cond, Denoise, Denoiser


class Draws(Stage):
    """A stage that draws images: Algorithm 2 of Ho et al. 2020, or another sampler, with guidance."""

    latents: LatentSpace
    conditioner: Conditioner
    denoiser: nn.Module
    objective: Objective
    sampler: Sampler
    guidance: Guidance
    sample_size: tuple[int, int] | None = None
    """Height and width of the images to draw; None: the square trained on."""

    @torch.no_grad()
    def generate(self, batch: Batch, seed: int) -> Tensor:
        """Draw one image per sample of ``batch``, conditioned on it.

        The size is that of ``batch["image"]``, or else ``sample_size``, or else the square trained on.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].
        """
        noise = SampleNoise(seed, batch["key"])
        shape = self.latents.shape(*self._sample_size(batch))
        x = noise.like(torch.empty(len(batch["key"]), *shape, device=self.device))
        estimates = self.estimates(self.sampler.estimator(self.objective))
        denoise = self.latents.constrain(self.guidance(estimates, batch))
        steps = self._steps()
        return self.latents.decode(self.sampler(denoise, steps, steps[0].start_std * x, noise.like))

    def _sample_size(self, batch: Batch) -> tuple[int, int]:
        """Return height and width of the images to draw."""
        if "image" in batch:
            return batch["image"].shape[-2], batch["image"].shape[-1]
        if self.sample_size is not None:
            return self.sample_size
        if self.image_size is None:
            raise ValueError("the image size is unknown: give batch['image'] or train first")
        return self.image_size, self.image_size

    @torch.no_grad()
    def redraw(
        self, batch: Batch, seed: int, image: Tensor, strength: float = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """Noise an image and denoise it, partly or within a mask: Meng et al. 2021 (arXiv:2108.01073).

        Args:
            batch: What the samples are conditioned on.
            seed: Seed of the random numbers.
            image: The image to start from, (3, H, W) or (B, 3, H, W) in [-1, 1].
            strength: Fraction of the trajectory, in (0, 1]; 1 keeps nothing but what the mask keeps.
            mask: 1 where to paint, 0 where the image stays, (1, H, W) or (B, 1, H, W); None: everywhere.

        Returns:
            (B, 3, H, W) float32 in [-1, 1], outside of the mask the image itself.
        """
        noise = SampleNoise(seed, batch["key"])
        image = image.to(self.device).expand(len(batch["key"]), -1, -1, -1)
        mean = image.new_zeros(len(image), *self.latents.shape(*image.shape[-2:]))
        known = self.latents.encode({"key": batch["key"], "image": image}, mean)
        steps = self._steps()
        steps = steps[len(steps) - max(1, round(strength * len(steps))) :]
        x = steps[0].alpha * known + steps[0].sigma * noise.like(known)
        denoise = self.latents.constrain(self.guidance(self.estimates(), batch))
        if mask is None:
            return self.latents.decode(self.sampler(denoise, steps, x, noise.like))
        mask = mask.to(self.device).expand(len(image), -1, -1, -1)
        # a pixel of the latent is painted if any of its pixels is
        painted = F.max_pool2d(mask, self.latents.factor)
        drawn = self.sampler(inpainted(denoise, known, painted), steps, x, noise.like)
        return torch.where(mask > 0, self.latents.decode(drawn), image)

    def drawing_blocks(self) -> list[nn.Module]:
        """Return the blocks that ``generate`` runs: of the denoisers, guidance's too, and the autoencoder."""
        guides = [each.module for each in self.guidance.modules() if isinstance(each, Frozen)]
        denoisers = [self.denoiser, *(each.denoiser for each in guides if isinstance(each, Draws))]
        found = [block for net in denoisers for block in blocks_of(net)]
        return [*found, *self.latents.frozen_blocks()]

    def estimates(self, estimator: Callable[[Network], Denoise] | None = None) -> Estimates:
        """Return what guidance combines.

        Args:
            estimator: Turns the raw network into an estimate, see ``Sampler.estimator``; one of x0 alone
                unless given.
        """
        return Estimates(self, estimator or self.objective.denoiser)

    def cond(self, batch: Batch) -> Denoise:
        """Condition on ``batch``: a function from (x_t, t) to x0_hat."""
        return self.estimates().cond(batch)

    def network(self, cond: Cond) -> Network:
        """Give the network its condition."""
        denoiser: Denoiser = self.denoiser
        return lambda x, t: denoiser(x, t, cond)

    def _steps(self) -> list[Step]:
        return self.sampler.steps(self.objective.schedule)
