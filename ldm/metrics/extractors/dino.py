"""DINOv2, whose features judge images more like people do than Inception's."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.io.weights import sha256
from ldm.metrics.features import Extractor
from ldm.metrics.metric import Metadata
from ldm.types import Batch

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2(Extractor):
    """A vision transformer of timm; ``features`` are its class token (Stein et al. 2023, arXiv:2306.04675).

    The distance is FD-DINOv2 with the default model and its weights; timm resizes the positions to 224 pixels
    with antialiasing, the authors' program without, so that the last digits may differ.

    Args:
        weights: Local file of timm's weights, .safetensors or .pth. Nothing is downloaded.
        model: Name of the model in timm.
        size: Side that images are resized to, bicubic with antialiasing.
        name: Short name; values are called ``<measure>/<name>``.
    """

    def __init__(
        self,
        weights: str,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        size: int = 224,
        name: str = "dinov2",
    ) -> None:
        import timm  # here: a second of each start

        super().__init__(name, ("features",))
        if not Path(weights).is_file():
            raise FileNotFoundError(f"weights: file '{weights}' of timm's {model} does not exist")
        overlay = {"file": weights, "num_classes": 0}
        self.net = timm.create_model(
            model,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            img_size=size,
            num_classes=0,
            global_pool="token",
        )
        self.net.eval().requires_grad_(False)
        self.model, self.size, self.weights_sha256 = model, size, sha256(weights)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Compute features of images (B, 3, H, W) in [-1, 1]."""
        return {"features": self.image_features(images)}

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to class tokens (B, F)."""
        size = (self.size, self.size)
        pixels = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
        features: Tensor = self.net(((pixels + 1.0) / 2.0 - self.mean) / self.std)
        return features

    def metadata(self) -> Metadata:
        """Name implementation, weights and resizing."""
        import timm

        return {
            "implementation": f"timm {timm.__version__} {self.model}",
            "weights_sha256": self.weights_sha256,
            "resize": f"torch bicubic, antialias, to {self.size}",
        }
