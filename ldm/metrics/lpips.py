"""LPIPS: perceptual distance of images to their originals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from ldm.io.weights import bare, read_weights, sha256
from ldm.metrics.metric import MeanMetric, Metadata
from ldm.types import Batch

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


class LPIPS(MeanMetric):
    """Learned perceptual distance (Zhang et al. 2018, arXiv:1801.03924) against ``batch["image"]``, v0.1.

    The linear layers come with torchmetrics; the network below them is torchvision's, from a local file.

    Args:
        weights: Local file of torchvision's AlexNet or VGG-16 (ImageNet). Nothing is downloaded.
        net: "alex" is the usual one for measuring, "vgg" for training.
        name: Name of the value.
    """

    def __init__(self, weights: str, net: Literal["alex", "vgg"] = "alex", name: str = "lpips") -> None:
        super().__init__(name, higher_is_better=False)
        self.net = net
        self.network = _LPIPS(net=net, pnet_rand=True)
        features = {k: v for k, v in bare(read_weights(weights)).items() if k.startswith("features.")}
        self._fill(features, weights)
        self.weights_sha256 = sha256(weights)

    @torch.no_grad()
    def measure(self, images: Tensor, batch: Batch) -> Tensor:
        """Compare images with their originals; 0 is equal."""
        distance: Tensor = self.network(images.float(), batch["image"].float())
        return distance.flatten()

    def metadata(self, name: str) -> Metadata:
        """Add network and weights."""
        return super().metadata(name) | {"network": self.net, "weights_sha256": self.weights_sha256}

    def _fill(self, features: dict[str, Tensor], weights: str) -> None:
        """Give the slices of the network torchvision's numbers: their layers keep them as names."""
        own = self.network.net.state_dict()
        found = {name: features.get(f"features.{name.split('.', 1)[1]}") for name in own}
        wrong = [name for name, value in found.items() if value is None or value.shape != own[name].shape]
        if wrong:
            raise ValueError(
                f"lpips: file '{weights}' lacks {len(wrong)} of {len(own)} tensors of {self.net}, such as "
                f"{wrong[0]}: expected torchvision's {FILES[self.net]}"
            )
        self.network.net.load_state_dict(found)
