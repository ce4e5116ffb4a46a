"""Guidance by a weaker version of the model."""

from __future__ import annotations

from ldm.diffusion.guidance import Guidance, extrapolated
from ldm.frozen import Frozen
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Batch, Conditional, Denoise


class Autoguidance(Frozen[Diffusion], Guidance):
    """Away from the errors of a weaker model: Karras et al. 2024 (arXiv:2406.02507), Eq. 3.

    x0_hat = weak + scale (strong - weak), both with the condition, so that pictures get better without
    getting alike.

    Args:
        checkpoint: Checkpoint or run folder of a smaller or less trained model of the same latents.
        scale: 1 is the model itself, 2 or so is best in the paper.
    """

    def __init__(self, checkpoint: str, scale: float) -> None:
        super().__init__(load_stage(checkpoint, Diffusion))
        self.scale = scale

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Extrapolate from the weaker model's estimate through the stronger one's."""
        return extrapolated(self.module.cond(batch), model.cond(batch), self.scale)
