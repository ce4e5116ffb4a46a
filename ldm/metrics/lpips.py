"""LPIPS: perceptual distance of images to their originals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ldm.io.weights import sha256
from ldm.metrics.metric import MeanMetric, Metadata
from ldm.nets.lpips import LPIPSNet
from ldm.types import Batch


class LPIPS(MeanMetric):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924) against ``batch["image"]``, v0.1.

    The weights of channels come with torchmetrics, those of the network from a local file of torchvision's.

    Args:
        weights: Local file of torchvision's AlexNet or VGG-16 (ImageNet). Nothing is downloaded.
        net: "alex" is the usual one for measuring, "vgg" for training.
        name: Name of the value.
    """

    def __init__(self, weights: str, net: Literal["alex", "vgg"] = "alex", name: str = "lpips") -> None:
        super().__init__(name, higher_is_better=False)
        self.net = net
        self.network = LPIPSNet(weights, net)
        self.weights_sha256 = sha256(weights)

    @torch.no_grad()
    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare images with their originals; 0 is equal."""
        distance: Tensor = self.network(images, batch["image"])
        return distance

    def metadata(self, name: str) -> Metadata:
        """Add network and weights."""
        return super().metadata(name) | {"network": self.net, "weights_sha256": self.weights_sha256}
