"""Alignment of a denoiser's hidden states with the features of a frozen network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ldm.io.config import Configurable
from ldm.losses.term import LossTerm
from ldm.nets.feature_maps import FeatureMaps
from ldm.nets.hidden import as_map
from ldm.optim.recipes import Optimization
from ldm.types import Batch

EPS = 1e-6
"""Added to a standard deviation."""


class Head(Configurable, ABC):
    """What hidden states and features pass through before they are compared."""

    @abstractmethod
    def projector(self, channels: int, features: int) -> nn.Module:
        """Build the network from hidden states (B, channels, h, w) to (B, features, h, w)."""

    def target(self, features: Tensor) -> Tensor:
        """Prepare features (B, F, h, w) of the frozen network."""
        return features


class MLPHead(Head):
    """Three layers with SiLU between them at each position: REPA.

    Args:
        width: Width of the inner ones.
    """

    def __init__(self, width: int = 2048) -> None:
        self.width = width

    @override
    def projector(self, channels: int, features: int) -> nn.Module:
        widths = [channels, self.width, self.width, features]
        layers: list[nn.Module] = []
        for ins, outs in pairwise(widths):
            layers += [nn.Conv2d(ins, outs, 1), nn.SiLU()]
        return nn.Sequential(*layers[:-1])


class ConvHead(Head):
    """A convolution, and features whose mean over positions is taken away: iREPA.

    Singh et al. 2025 (arXiv:2512.10794): structure in space is what helps, and a mean that all positions have
    in common hides it.

    Args:
        kernel: Side of the convolution's kernel, odd.
    """

    def __init__(self, kernel: int = 3) -> None:
        if kernel % 2 == 0:
            raise ValueError(f"model.losses: ConvHead has kernel {kernel}, expected an odd number")
        self.kernel = kernel

    @override
    def projector(self, channels: int, features: int) -> nn.Module:
        return nn.Conv2d(channels, features, self.kernel, padding=self.kernel // 2)

    @override
    def target(self, features: Tensor) -> Tensor:
        centred = features - features.mean((2, 3), keepdim=True)
        return centred / (features.std((2, 3), keepdim=True) + EPS)


class Alignment(LossTerm):
    """1 - cosine similarity of projected hidden states and features of the clean image: REPA, in [0, 2].

    Yu et al. 2024 (arXiv:2410.06940): a denoiser learns faster if the hidden states of one of its blocks are
    drawn to those of a network that knows images, at each position. Features are resampled to the positions
    of the hidden states. The projector is trained along; a trained model does without. Training needs the
    images, also with stored latents: ``ldm.encode --keep-images``.

    Args:
        extractor: A network with ``image_features(image)``: CLIPTower (one's own CLIP), OpenCLIP, DINOv2.
        block: Module of the denoiser whose output is aligned, e.g. ``transformer_blocks.7`` of a DiT or
            ``mid_block.resnets.1`` of a UNet.
        layer: Module of the extractor whose output holds the features, as tokens or as a map; "" takes the
            vector that it returns, the same for all positions.
        head: Projector, and what is done to features; that of REPA unless given.
        weight: Factor of the term in the loss; 0.5 in the paper.
        optimizer: Recipe of the projector; that of the stage unless given.
        stop: Training samples after which nothing is aligned any more; None never stops.
    """

    name = "alignment"
    reads = ("image",)

    def __init__(
        self,
        extractor: Callable[[], nn.Module],
        block: str,
        layer: str = "",
        head: Head | None = None,
        weight: float = 0.5,
        optimizer: Optimization | None = None,
        stop: int | None = None,
    ) -> None:
        super().__init__(weight, optimizer)
        self.extractor, self.block, self.layer, self.stop = extractor, block, layer, stop
        self.head = head or MLPHead()
        self.hidden = (block,)
        self.projector: nn.Module | None = None
        self._channels = 0
        self._maps: FeatureMaps | None = None
        self.register_load_state_dict_pre_hook(_build_projector)

    @property
    @override
    def is_active(self) -> bool:
        return super().is_active and (self.stop is None or self.samples < self.stop)

    @override
    def bind(self, channels: Mapping[str, int]) -> None:
        self._channels = channels[self.block]

    @override
    def prepare(self) -> None:
        if self._maps is None:
            self._maps = FeatureMaps(self.extractor, [self.layer] if self.layer else [], flatten=False)
        if self.projector is None:
            with torch.no_grad():
                features = self._maps(torch.zeros(1, 3, 32, 32))[0]
            self.build(as_map(features, 32, 32).shape[1])

    def build(self, features: int) -> None:
        """Build the projector, to ``features`` channels."""
        if not self._channels:
            raise ValueError(
                f"model.losses: {type(self).__name__} aligns a denoiser, expected a stage of diffusion"
            )
        self.projector = self.head.projector(self._channels, features)

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        assert self.projector is not None and self._maps is not None
        hidden = outputs[f"hidden/{self.block}"]
        with torch.no_grad():
            found = self._maps(batch["image"])[0].float()
            features = as_map(found, *batch["image"].shape[-2:])
            target = self.head.target(resampled(features, hidden.shape[2], hidden.shape[3]))
        return 1.0 - F.cosine_similarity(self.projector(hidden).float(), target, dim=1).mean((1, 2))


def resampled(features: Tensor, height: int, width: int) -> Tensor:
    """Resample features (B, F, h, w) to a height and a width; averaged where they become fewer."""
    if features.shape[2:] == (height, width):
        return features
    return F.interpolate(features, (height, width), mode="bilinear", antialias=True)


def _build_projector(term: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Build the projector of a checkpoint without the extractor, which a trained model does not need."""
    biases = [value for name, value in state.items() if name.startswith(f"{prefix}projector.")]
    if isinstance(term, Alignment) and term.projector is None and biases:
        term.build(biases[-1].shape[0])
