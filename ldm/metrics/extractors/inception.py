"""The Inception network that published FIDs are measured with."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.io.images import to_bytes
from ldm.io.weights import bare, read_weights, sha256
from ldm.metrics.features import Extractor
from ldm.metrics.metric import Metadata
from ldm.types import Batch

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

URL = "torch-fidelity's release v0.2.0, weights-inception-2015-12-05-6726825d.pth"
SPATIAL_CHANNELS = 7
"""Channels of the mixed_6 block, as in the evaluation of Dhariwal & Nichol 2021."""


class Inception(Extractor):
    """Inception v3 of 2015 as converted by torch-fidelity, on images rounded to uint8.

    ``features`` are the 2048 of the last pooling (FID, KID, precision and recall), ``spatial`` the first 7
    channels of the mixed_6 block at 17 x 17 positions (sFID; Nash et al. 2021, arXiv:2103.03841), ``logits``
    the 1008 without bias (Inception score). Images are resized to 299 as TensorFlow 1 did, bilinearly.

    Args:
        weights: Local file of torch-fidelity's weights. Nothing is downloaded.
        name: Short name; values are called ``<measure>/<name>``.
    """

    def __init__(self, weights: str, name: str = "inception") -> None:
        super().__init__(name, ("features", "spatial", "logits"))
        self.net = _network(weights)
        self.weights_sha256 = sha256(weights)
        self._spatial: list[Tensor] = []
        self.net.Mixed_6d.register_forward_hook(self._keep)

    @torch.no_grad()
    def forward(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Compute features of images (B, 3, H, W) in [-1, 1]; all views come from one pass."""
        self._spatial.clear()
        features, logits = self.net(to_bytes(images))
        # (B, 17, 17, 7) flattened: the order of published statistics
        spatial = self._spatial.pop().permute(0, 2, 3, 1).flatten(1)
        return {"features": features, "spatial": spatial, "logits": logits}

    def metadata(self) -> Metadata:
        """Name implementation, weights and resizing."""
        import torch_fidelity

        return {
            "implementation": f"torch-fidelity {torch_fidelity.__version__} FeatureExtractorInceptionV3",
            "weights_sha256": self.weights_sha256,
            "resize": "TensorFlow 1 bilinear, no antialias, to 299",
        }

    def _keep(self, module: object, arguments: object, output: Tensor) -> None:
        self._spatial.append(output[:, :SPATIAL_CHANNELS])


def _network(weights: str) -> FeatureExtractorInceptionV3:
    """Build the network; the library would unpickle any file, so it gets one that we wrote."""
    # here: with torchvision, which it brings, a quarter of a second of each start
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        state = bare(read_weights(weights))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: get it from {URL}") from error
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], file)
    except RuntimeError as error:
        raise ValueError(
            f"file '{weights}' has {len(state)} tensors that do not fit, expected the 566 of {URL}"
        ) from error
