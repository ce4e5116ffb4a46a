"""Learned perceptual distance of a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor
from typing_extensions import override

from ldm.losses.term import LossTerm, Reduction
from ldm.nets.frozen import Frozen
from ldm.nets.lpips import FILES, LPIPSNet
from ldm.types import Batch


class LPIPS(LossTerm):
    """LPIPS (Zhang et al. 2018, arXiv:1801.03924) of the reconstructed image, version 0.1.

    The files are read when training starts: a trained autoencoder does not need them.

    Args:
        weights: Local file of torchvision's VGG-16 (vgg16-397923af.pth) or AlexNet. Nothing is downloaded.
        weight: Factor of the term in the loss.
        net: "vgg" is the usual one for training, "alex" for measuring.
        heads: Local file of the weights of channels in the ``lpips`` package's format; its own by default.
        reduction: "sum" multiplies by 3 H W: the distance is added to the error of every value of the image,
            as in Rombach et al.'s program. "mean" leaves it as it is.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.
    """

    name = "lpips"

    def __init__(
        self,
        weights: str,
        weight: float = 1.0,
        net: Literal["vgg", "alex"] = "vgg",
        heads: str | None = None,
        reduction: Reduction = "sum",
        start: int = 0,
        ramp: int = 0,
    ) -> None:
        super().__init__(weight, start=start, ramp=ramp)
        self.weights, self.net, self.heads, self.reduction = weights, net, heads, reduction
        self._network: Frozen[LPIPSNet] | None = None

    @override
    def prepare(self) -> None:
        if self._network is None:
            if not Path(self.weights).is_file():
                raise FileNotFoundError(
                    f"model.losses: LPIPS needs torchvision's {FILES[self.net]}, but the file "
                    f"'{self.weights}' does not exist; nothing is downloaded"
                )
            self._network = Frozen(LPIPSNet(self.weights, self.net, self.heads))

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        self.prepare()
        assert self._network is not None
        network = self._network.module.to(batch["image"].device)
        distance: Tensor = network(outputs["image"], batch["image"])
        return distance * batch["image"][0].numel() if self.reduction == "sum" else distance
