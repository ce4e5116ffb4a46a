"""The network of LPIPS: features of an image classifier, compared position by position."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.io.weights import bare, check, read_weights
from ldm.types import fitting

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
"""torchvision's names of the classifiers' weights (ImageNet)."""
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers of torchvision's ``features`` that are compared, all of them ReLUs."""
CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's colours, for images in [-1, 1]."""
SMALLEST = 1e-10
"""Norm below which features count as none."""


class LPIPSNet(nn.Module):
    """Learned perceptual distance, version 0.1 (Zhang et al. 2018, arXiv:1801.03924, Eq. 1).

    Args:
        weights: Local file of torchvision's AlexNet or VGG-16. Nothing is downloaded.
        net: Which of them.
        heads: Local file of the weights of channels in the format of the ``lpips`` package; its own, of which
            torchmetrics has a copy, unless given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: str, net: Literal["alex", "vgg"], heads: str | None = None) -> None:
        super().__init__()
        self.taps = TAPS[net]
        self.features = trunk(net)
        _load(self.features, weights, net)
        for i, head in enumerate(_heads(heads, net)):
            self.register_buffer(f"head{i}", head)
        for name, value in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Compare images (B, 3 or 1, H, W) in [-1, 1] with others; gradients reach the first.

        Returns:
            (B,) float32, 0 where the images are equal.
        """
        with torch.no_grad():
            others = self._unit_features(target)
        total = torch.zeros(len(image), device=image.device)
        for i, (one, other) in enumerate(zip(self._unit_features(image), others, strict=True)):
            total = total + ((one - other).square() * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return total

    def _unit_features(self, image: Tensor) -> list[Tensor]:
        """Return the features of each tap, of norm 1 at each position."""
        x, found = (fitting(image, self, "LPIPS").float() - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                y = x.float()
                # the root of a sum of 0 has no gradient: hence the smallest norm below it, too
                norm = (y.square().sum(1, keepdim=True) + SMALLEST**2).sqrt()
                found.append(y / (norm + SMALLEST))
        return found


def trunk(net: Literal["alex", "vgg"]) -> nn.Sequential:
    """Build a classifier's layers up to its last ReLU, numbered as torchvision's, with random weights."""
    return nn.Sequential(*(_vgg() if net == "vgg" else _alexnet()))


def _vgg() -> list[nn.Module]:
    """The layers of VGG-16 up to its last ReLU (Simonyan & Zisserman 2014, arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    before = 3
    for width, count in zip(CHANNELS["vgg"], (2, 2, 3, 3, 3), strict=True):
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
    return layers


def _alexnet() -> list[nn.Module]:
    """The layers of AlexNet up to its last ReLU, in the form of Krizhevsky 2014 (arXiv:1404.5997)."""
    return [
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _load(features: nn.Sequential, weights: str, net: str) -> None:
    state = bare(read_weights(weights))
    own = features.state_dict()
    found = {name: state.get(f"features.{name}") for name in own}
    wrong = [name for name, value in found.items() if value is None or value.shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"lpips: file '{weights}' lacks {len(wrong)} of {len(own)} tensors of {net}, such as "
            f"features.{wrong[0]}: expected torchvision's {FILES[net]}"
        )
    features.load_state_dict(found)


def _heads(path: str | None, net: str) -> list[Tensor]:
    """Read the weights of channels, (C, 1, 1) of each tap."""
    if path is None:
        spec = find_spec("torchmetrics")
        assert spec is not None and spec.origin is not None
        path = str(Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth")
    found = read_weights(path)
    names = {f"lin{i}.model.1.weight": (1, width, 1, 1) for i, width in enumerate(CHANNELS[net])}
    check(found, names, f"lpips heads '{path}'")
    return [found[name][0].float() for name in names]
