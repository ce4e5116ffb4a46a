"""Perceptual distance in the features of any network that describes images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from ldm.losses.term import LossTerm, Reduction
from ldm.nets.feature_maps import FeatureMaps
from ldm.types import Batch


class FeatureDistance(LossTerm):
    """Squared distance of unit features of the reconstruction and the image, in [0, 4].

    As in LPIPS (Zhang et al. 2018, Eq. 1) with equal weights: features are of norm 1 at each position, and
    squared distances are averaged over positions, then over layers. The network is built when training
    starts: a trained autoencoder does not need it.

    Args:
        extractor: A network with ``image_features(image)``: CLIPTower (one's own CLIP), OpenCLIP, DINOv2.
        layers: Modules of it whose outputs are compared; the vector that it returns, unless given.
        weight: Factor of the term in the loss.
        reduction: "mean" is the distance; "sum" multiplies by 3 H W, as for errors summed over an image.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
        name: Name in the log.
    """

    def __init__(
        self,
        extractor: Callable[[], nn.Module],
        layers: Sequence[str] = (),
        weight: float = 1.0,
        reduction: Reduction = "sum",
        start: int = 0,
        ramp: int = 0,
        name: str = "features",
    ) -> None:
        super().__init__(weight, start=start, ramp=ramp)
        self.extractor, self.layers, self.reduction, self.name = extractor, list(layers), reduction, name
        self._maps: FeatureMaps | None = None

    @override
    def prepare(self) -> None:
        if self._maps is None:
            self._maps = FeatureMaps(self.extractor, self.layers)

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        self.prepare()
        assert self._maps is not None
        with torch.no_grad():
            targets = [target.float() for target in self._maps(batch["image"])]
        distances = [
            unit_distance(value.float(), target)
            for value, target in zip(self._maps(outputs["image"].float()), targets, strict=True)
        ]
        distance = torch.stack(distances).mean(0)
        return distance * batch["image"][0].numel() if self.reduction == "sum" else distance


def unit_distance(one: Tensor, other: Tensor) -> Tensor:
    """Average |a / |a| - b / |b||^2 over positions.

    Args:
        one: (B, channels, positions).
        other: The same shape.

    Returns:
        (B,), in [0, 4].
    """
    difference = nn.functional.normalize(one, dim=1) - nn.functional.normalize(other, dim=1)
    return difference.square().sum(1).mean(1)
