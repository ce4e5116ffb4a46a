"""A loss term with parameters of its own."""

from torch import nn

from ldm.losses.term import LossTerm
from ldm.optim.recipes import Optimization


class FeatureMatching(LossTerm):
    """Distance of a learned linear map of the posterior's mean to the image in low resolution.

    Args:
        channels: Of the latent.
        weight: Factor of the term in the loss.
        optimizer: Recipe of the map.
    """

    name = "matching"

    def __init__(self, channels: int, weight: float = 1.0, optimizer: Optimization | None = None):
        super().__init__(weight, optimizer)
        self.projector = nn.Conv2d(channels, 3, 1)

    def forward(self, batch, outputs):
        output = self.projector(outputs["mean"])
        target = nn.functional.adaptive_avg_pool2d(batch["image"], output.shape[-2:])
        return (output - target).float().square().flatten(1).sum(1)
