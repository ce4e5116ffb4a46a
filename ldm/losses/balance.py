"""Adaptive weight of adversarial terms, found in the backward pass itself.

Esser et al. 2021 (arXiv:2012.09841), Eq. 7: lambda = |grad L_rec| / (|grad L_GAN| + delta), gradients with
respect to the weight of the decoder's last layer, L_rec being all other terms. Here the graph is cut at the
reconstructed image, where the terms' gradients arrive one by one. Those of the last layer's weight follow
from them and the layer's input, and the network gets the combined gradient: it is gone through once, as the
terms' networks are. In place of delta, which would depend on the scale of the loss, the weight is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


@dataclass
class LastLayer:
    """The layer that makes the image, and what went into it.

    Args:
        layer: The convolution.
        hidden: Its input, (B, C, H, W).
    """

    layer: nn.Conv2d
    hidden: Tensor


@dataclass
class Balance:
    """Combines the gradients of an image's losses.

    Args:
        last: What the image was made by.
        scales: Factor of each adversarial term's adaptive weight.
        bounds: Largest adaptive weight of each.
    """

    last: LastLayer
    scales: list[float]
    bounds: list[float]
    weights: Tensor = field(init=False)
    """(n,) float32, the adaptive weights: 0 until the backward pass has found them."""

    def __post_init__(self) -> None:
        self.weights = torch.zeros(len(self.scales), device=self.last.hidden.device)

    def split(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the image for the terms of fixed weight, and for each adversarial term; in float32.

        Args:
            image: The output of ``last``. Losses of what is returned enter the total with weight 1.
        """
        found: tuple[Tensor, ...] = _Split.apply(image.float(), self.last.hidden.detach(), self)
        return found

    def combine(self, hidden: Tensor, rest: Tensor, players: tuple[Tensor, ...]) -> Tensor:
        """Weigh the gradients (B, 3, H, W) of the adversarial terms against that of the rest, and add up."""
        norms = _weight_gradients(self.last.layer, hidden, (rest, *players)).norm(dim=1)
        ratios = norms[0] / norms[1:].clamp_min(torch.finfo(norms.dtype).tiny)
        for i, (gradient, scale, bound) in enumerate(zip(players, self.scales, self.bounds, strict=True)):
            self.weights[i] = ratios[i].clamp(max=bound)  # on the device: nothing waits for it
            rest = torch.addcmul(rest, self.weights[i] * scale, gradient)
        return rest


class _Split(torch.autograd.Function):
    """Hands an image on several times; backward, the gradients of all of them are combined."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, hidden: Tensor, balance: Balance) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden)
        ctx.balance = balance
        return tuple(image.view_as(image) for _ in range(len(balance.scales) + 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        return ctx.balance.combine(hidden, gradients[0], gradients[1:]), None, None


def _weight_gradients(layer: nn.Conv2d, hidden: Tensor, gradients: tuple[Tensor, ...]) -> Tensor:
    """Compute the gradients of the layer's weight, averaged over processes, one row for each of the image.

    Args:
        layer: The convolution; its weight is not read, so that it may be sharded.
        hidden: Its input.
        gradients: Of its output, n times (B, 3, H, W).

    Returns:
        (n, weights of the layer) float32.
    """
    n, channels, grads = len(gradients), gradients[0].shape[1], torch.cat(gradients, dim=1).float()
    shape = (n * channels, layer.in_channels, *layer.kernel_size)
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = conv2d_weight(hidden.float(), shape, grads, layer.stride, layer.padding)
    found = found.contiguous().view(n, -1)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found
