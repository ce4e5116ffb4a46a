"""Guidance by a weaker version of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from ldm.diffusion.guidance import Guidance, extrapolated
from ldm.diffusion.schedule import Schedule
from ldm.io.upstream import open_upstream
from ldm.nets.frozen import Frozen
from ldm.types import Batch, Conditional, Denoise

if TYPE_CHECKING:
    from ldm.stages.draws import Draws


class Autoguidance(Frozen["Draws"], Guidance):
    """Autoguidance by a weaker model: Karras et al. 2024 (arXiv:2406.02507), Eq. 3.

    x0_hat = weak + scale (strong - weak), each with the condition: images improve without loss of variety.

    Args:
        checkpoint: Checkpoint or run folder of a smaller or less trained model of the same latents.
        scale: 1 is the model itself, 2 or so is best in the paper.

    Raises:
        ValueError: When it guides a model with another noise schedule, or of other latents.
    """

    def __init__(self, checkpoint: str, scale: float) -> None:
        from ldm.stages.diffusion import (
            Diffusion,  # here, so that --help of commands does not import Lightning
        )
        from ldm.stages.load import load_stage

        found = open_upstream(checkpoint, Diffusion.name)
        super().__init__(load_stage(found, Diffusion))
        self.checkpoint, self.sha256 = checkpoint, found.sha256
        self.scale = scale

    uses_uncond = False

    @property
    @override
    def upstream(self) -> dict[str, str]:
        return {self.checkpoint: self.sha256}

    @override
    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        from ldm.stages.estimates import Estimates

        if isinstance(model, Estimates):
            self._check(model.stage)
        return extrapolated(self.module.cond(batch), model.cond(batch), self.scale)

    def _check(self, model: Draws) -> None:
        weak, strong = self.module.objective.schedule, model.objective.schedule
        if not (torch.equal(weak.alpha, strong.alpha) and torch.equal(weak.sigma, strong.sigma)):
            raise ValueError(
                f"guidance.checkpoint: '{self.checkpoint}' has another noise schedule, {_about(weak)}, than "
                f"the model that it guides, {_about(strong)}: a timestep means another noise level to it"
            )
        ours, theirs = self.module.latents, model.latents
        if ours.encoder_sha256 != theirs.encoder_sha256 or ours.channels != theirs.channels:
            raise ValueError(
                f"guidance.checkpoint: '{self.checkpoint}' was trained in the latents of another autoencoder "
                "than the model that it guides"
            )


def _about(schedule: Schedule) -> str:
    return f"{type(schedule).__name__} of {schedule.num_steps} steps"
