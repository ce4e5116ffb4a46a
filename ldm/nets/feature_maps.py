"""Features of several layers of a frozen network, which gradients pass through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from ldm.nets.frozen import Frozen
from ldm.types import fitting


@runtime_checkable
class DescribesImages(Protocol):
    """A network that describes an image by a vector: a CLIP, DINOv2, or one of another package."""

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, F)."""
        ...


class FeatureMaps(Frozen[nn.Module]):
    """Outputs of layers of a network while it describes an image.

    Args:
        build: Makes the network.
        layers: Names of its modules, e.g. ``model.visual.layer1``; without any, the vector that it returns.
        flatten: Bring outputs into one form (B, channels, positions); otherwise they stay as they are.

    Raises:
        ValueError: If it describes no images, or has no such module.
    """

    def __init__(
        self, build: Callable[[], nn.Module], layers: Sequence[str] = (), flatten: bool = True
    ) -> None:
        network = build()
        if not isinstance(network, DescribesImages):
            raise ValueError(f"extractor: {type(network).__name__} has no image_features(image)")
        super().__init__(network)
        self._found: dict[str, Tensor] = {}
        self._device: torch.device | None = None
        self.layers, self.flatten = list(layers), flatten
        holder = cast(nn.Module, network.module) if isinstance(network, Frozen) else network
        modules = dict(holder.named_modules())
        for name in layers:
            if name not in modules:
                near = [key for key in modules if key and key.count(".") == name.count(".")]
                raise ValueError(
                    f"extractor: {type(network).__name__} has no module '{name}', expected such as "
                    f"{', '.join(near[:4])}"
                )
            modules[name].register_forward_hook(self._keep(name))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map images, RGB or grey, in [-1, 1] to features of each layer, (B, channels, positions) if flat."""
        if self._device != image.device:
            self.module.to(image.device)
            self._device = image.device
        self._found.clear()
        image = fitting(image, self.module, type(self.module).__name__)
        vector = cast(DescribesImages, self.module).image_features(image)
        if not self.layers:
            return [vector[:, :, None] if self.flatten else vector]
        found = [self._found.pop(name) for name in self.layers]
        return [_channels_first(value) for value in found] if self.flatten else found

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self._found[name] = output

        return hook


def _channels_first(value: Tensor) -> Tensor:
    """Bring maps (B, C, h, w), tokens (B, L, C) and vectors (B, C) into one form."""
    if value.ndim == 3:
        return value.transpose(1, 2)
    return value.flatten(2) if value.ndim == 4 else value[:, :, None]
