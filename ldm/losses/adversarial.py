"""Adversarial loss: a discriminator is trained with the network that it judges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from ldm.io.config import Configurable
from ldm.losses.regularizers import Regularizer
from ldm.losses.term import LossTerm
from ldm.nets.discriminator import Discriminator
from ldm.optim.recipes import Optimization
from ldm.types import Batch


class Game(Configurable, ABC):
    """Losses of the two players, as functions of the discriminator's logits."""

    @abstractmethod
    def generator(self, fake: Tensor) -> Tensor:
        """Return the loss of the network, of the shape of the logits of its images."""

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss of the discriminator, of the shape of both logits."""


class Hinge(Game):
    """Hinge loss (Lim & Ye 2017, arXiv:1705.02894), the discriminator's halved as in Esser et al. 2021.

    -D(x_hat) against (max(0, 1 - D(x)) + max(0, 1 + D(x_hat))) / 2.
    """

    @override
    def generator(self, fake: Tensor) -> Tensor:
        return -fake

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + fake))


class NonSaturating(Game):
    """Non-saturating loss (Goodfellow et al. 2014, arXiv:1406.2661, sec. 3), of probabilities sigmoid(D).

    -ln sigmoid(D(x_hat)) against -(ln sigmoid(D(x)) + ln(1 - sigmoid(D(x_hat)))) / 2.
    """

    @override
    def generator(self, fake: Tensor) -> Tensor:
        return F.softplus(-fake)

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.softplus(-real) + F.softplus(fake))


class Adversarial(LossTerm):
    """Adversarial loss of the reconstructed image (Esser et al. 2021, arXiv:2012.09841, sec. 3.1).

    Both players move in one step: the network's loss reaches no weight of the discriminator, and the
    discriminator's loss, on the same images, nothing but these. Logs ``adversarial``, the network's loss, and
    ``adversarial_discriminator``, the discriminator's; its logits ``adversarial_real`` and ``_fake``; and
    ``adversarial_weight``, the adaptive weight.

    Args:
        discriminator: The discriminator, e.g. PatchGAN.
        weight: Factor of the term in the loss, in addition to the adaptive weight.
        game: The two players' losses.
        start: Training samples seen before either player begins.
        ramp: Samples over which the weight then grows from 0; the discriminator learns from ``start`` on.
        max_adaptive: Largest adaptive weight (Esser et al. 2021, Eq. 7); None switches it off.
        regularizers: What else the discriminator minimises.
        optimizer: Recipe of the discriminator; that of the stage unless given. Its warm-up and decay count
            the steps of the run, not those from ``start`` on.
        name: Name in the log.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        weight: float = 0.5,
        game: Game | None = None,
        start: int = 0,
        ramp: int = 0,
        max_adaptive: float | None = 1e4,
        regularizers: Sequence[Regularizer] = (),
        optimizer: Optimization | None = None,
        name: str = "adversarial",
    ) -> None:
        super().__init__(weight, optimizer, start, ramp)
        self.discriminator = discriminator
        self.game = game or Hinge()
        self.max_adaptive, self.name = max_adaptive, name
        self.regularizers = nn.ModuleList(regularizers)

    @property
    @override
    def lower_is_better(self) -> tuple[str, ...]:
        return ()

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}_{value}" for value in ("discriminator", "real", "fake", "weight")))

    @override
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, weights, (outputs["image"],))
        return _mean(self.game.generator(logits.float()))

    @override
    def own_loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        regularizers = [cast(Regularizer, r) for r in self.regularizers] if torch.is_grad_enabled() else []
        real = batch["image"].detach()
        if any(regularizer.needs_gradient for regularizer in regularizers):
            real = real.clone().requires_grad_()
        images = torch.cat([real, outputs["image"].detach().to(real.dtype)])
        logits, made = self.discriminator(images).float().chunk(2)
        loss = _mean(self.game.discriminator(logits, made))
        self.logged = {
            f"{self.name}_discriminator": loss.detach(),
            f"{self.name}_real": _mean(logits.detach()),
            f"{self.name}_fake": _mean(made.detach()),
        }
        for regularizer in regularizers:
            loss = loss + regularizer.weight * regularizer(real, logits, made)
        return loss

    @override
    def on_step(self) -> None:
        self.discriminator.on_step()
        for regularizer in self.regularizers:
            cast(Regularizer, regularizer).on_step()

    @override
    def prepare(self) -> None:
        self.discriminator.prepare()

    @override
    def validate_size(self, size: int) -> None:
        self.discriminator.validate_size(size)


def _mean(logits: Tensor) -> Tensor:
    """Average over the patches of each image, (B,)."""
    return logits.flatten(1).mean(1)
