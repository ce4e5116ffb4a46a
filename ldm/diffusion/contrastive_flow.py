"""Flow matching that keeps the flows of different conditions apart."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.prediction import Flow, Prediction
from ldm.diffusion.schedule import RectifiedFlow, Schedule
from ldm.diffusion.timesteps import TimestepDistribution
from ldm.diffusion.weighting import Weighting


class ContrastiveFlow(Objective):
    """Contrastive flow matching: Stoica et al. 2025 (arXiv:2506.05350).

    In training, weight times the squared distance to the target of another sample of the batch, the one
    before it, is subtracted. So steps depend on which samples share a batch of a process. Validation has the
    plain error.

    Args:
        schedule: How much noise each timestep holds; ``RectifiedFlow`` unless given.
        prediction: What the network's output means; ``Flow`` unless given.
        weighting: How much each timestep counts; all the same unless given.
        timesteps: How often each timestep is visited; all equally unless given.
        weight: lambda in [0, 1); 0 is flow matching.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        timesteps: TimestepDistribution | None = None,
        weight: float = 0.05,
    ) -> None:
        if not 0 <= weight < 1:
            raise ValueError(f"objective.weight must be in [0, 1), got {weight}")
        super().__init__(schedule or RectifiedFlow(), prediction or Flow(), weighting, timesteps)
        self.contrast = weight

    def training_loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Subtract the distance to another sample's target: (B,) float32."""
        output, target = self._regressed(model, x0, noise, t)
        away = self._weighted(output - target.roll(1, 0), t)
        return self._weighted(output - target, t) - self.contrast * away
