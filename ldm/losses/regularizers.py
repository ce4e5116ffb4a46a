"""Regularizers of a discriminator, so that it does not run ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from ldm.io.config import Configurable


class Regularizer(Configurable, nn.Module, ABC):
    """A penalty on a discriminator.

    Args:
        weight: Factor of the penalty in the discriminator's loss.
    """

    needs_gradient: ClassVar[bool] = False
    """Whether it takes gradients with respect to the real images."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Compute the penalty of each sample.

        Args:
            image: Real images, (B, 3, H, W).
            real: Their logits, (B, ...).
            fake: Logits of their reconstructions, the same shape.

        Returns:
            (B,) float32.
        """

    def on_step(self) -> None:
        """Update what is not trained by gradients, once an optimizer step is complete."""


class R1(Regularizer):
    """R1 = |grad D(x)|^2 / 2 on real images (Mescheder et al. 2018, arXiv:1801.04406).

    D(x) is the mean of the image's logits; the gradient is that of its pixels in [-1, 1].

    Args:
        weight: gamma.
    """

    needs_gradient = True

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__(weight)

    @override
    def forward(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(real.flatten(1).mean(1).sum(), image, create_graph=True)
        return 0.5 * gradient.float().square().flatten(1).sum(1)


class LeCam(Regularizer):
    """LeCam divergence: (D(x) - a_fake)^2 + (D(x_hat) - a_real)^2, averages a of earlier logits.

    Tseng et al. 2021 (arXiv:2104.03310). The averages are of all processes' logits.

    Args:
        weight: Factor of the penalty in the discriminator's loss.
        decay: Decay of the averages a per optimizer step.
    """

    averages: Tensor
    count: Tensor

    def __init__(self, weight: float = 1e-3, decay: float = 0.99) -> None:
        super().__init__(weight)
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))
        self._found: list[Tensor] = []

    @override
    def forward(self, image: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        self._found.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
        # of a constant 0 at first, without bias
        mean_real, mean_fake = self.averages / (1.0 - self.decay**self.count).clamp_min(1e-8)
        penalty = (real - mean_fake).square() + (fake - mean_real).square()
        found: Tensor = penalty.flatten(1).mean(1) * (self.count > 0)
        return found

    @override
    @torch.no_grad()
    def on_step(self) -> None:
        if not self._found:
            return
        found = torch.stack(self._found).mean(0)
        self._found = []
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found)
            found /= dist.get_world_size()
        is_good = torch.isfinite(found).all()
        self.averages.copy_(torch.where(is_good, self.averages.lerp(found, 1.0 - self.decay), self.averages))
        self.count += is_good
