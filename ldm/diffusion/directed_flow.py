"""Flow matching that also learns the direction of the velocity."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.prediction import Flow
from ldm.diffusion.schedule import RectifiedFlow, Schedule
from ldm.diffusion.timesteps import TimestepDistribution


class DirectedFlow(Objective):
    """Flow matching with supervision of the direction: FasterDiT, Yao et al. 2024 (arXiv:2410.10356).

    In training, weight times 1 - cosine similarity of the velocity and its target is added, over the channels
    at each position. Validation has the plain error.

    Args:
        schedule: How much noise each timestep holds; ``RectifiedFlow`` unless given.
        timesteps: How often each timestep is visited; all equally unless given.
        weight: Factor of the direction, at least 0; 1 in the paper.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        timesteps: TimestepDistribution | None = None,
        weight: float = 1.0,
    ) -> None:
        if weight < 0:
            raise ValueError(f"objective.weight must be at least 0, got {weight}")
        super().__init__(schedule or RectifiedFlow(), Flow(), timesteps=timesteps)
        self.direction = weight

    def training_loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add the distance between directions: (B,) float32."""
        output, target = self._regressed(model, x0, noise, t)
        away = 1 - F.cosine_similarity(output, target, dim=1).mean((1, 2))
        return self._weighted(output - target, t) + self.direction * away
