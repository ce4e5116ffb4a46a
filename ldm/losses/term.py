"""Interface of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.optim.recipes import Optimization
from ldm.types import Batch

Reduction = Literal["sum", "mean"]
"""Reduction of an image's values to one number: their sum, or their mean, independent of the image's size."""


class LossTerm(Configurable, nn.Module, ABC):
    """A term of a stage's loss, logged unweighted as ``train/<name>`` and ``val/<name>``.

    It may have parameters, e.g. a projector: they are trained and saved with the stage's, but neither
    averaged nor exported. Before ``start`` it is not computed, and its parameters do not change.

    Args:
        weight: Factor of the term in the loss.
        optimizer: Recipe of the term's own parameters; that of the stage unless given.
        start: Training samples seen before the term begins.
        ramp: Samples over which the weight then grows from 0, linearly.

    Raises:
        ValueError: If ``start`` or ``ramp`` is negative.
    """

    name: str
    reads: tuple[str, ...] = ()
    """Fields of the batch that the term needs in addition to those of the stage."""
    hidden: tuple[str, ...] = ()
    """Modules of a denoiser whose outputs it gets in training, as maps (B, C, h, w) named hidden/<module>."""
    max_adaptive: float | None = None
    """Bound of the adaptive weight (``ldm.losses.balance``); None for a term that has none."""
    samples: int = 0
    """Training samples seen so far; the stage sets it."""

    def __init__(
        self, weight: float = 1.0, optimizer: Optimization | None = None, start: int = 0, ramp: int = 0
    ) -> None:
        super().__init__()
        if min(start, ramp) < 0:
            raise ValueError(
                f"model.losses: {type(self).__name__} has start {start}, ramp {ramp}, expected >= 0"
            )
        self.weight = weight
        self.optimizer = optimizer
        self.start, self.ramp = start, ramp
        self.logged: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the term's values have in the log."""
        return (self.name,)

    @property
    def lower_is_better(self) -> tuple[str, ...]:
        """Names of values of which, alone, a lower one is a better one."""
        return (self.name,)

    @property
    def is_active(self) -> bool:
        """Whether ``start`` is reached."""
        return self.samples >= self.start

    @property
    def scale(self) -> float:
        """Weight at this moment of training."""
        return self.weight * (min(1.0, (self.samples - self.start) / self.ramp) if self.ramp else 1.0)

    @abstractmethod
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the term of each sample; it may leave further values (B,) to log in ``logged``, by name.

        Args:
            batch: B samples.
            outputs: What the stage computed from them, by the names that its docstring lists.

        Returns:
            (B,) float32.
        """

    def own_loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """Compute what the term's own parameters alone minimise, such as a discriminator's loss.

        Args:
            batch: As for ``forward``, which is called first.
            outputs: The same; no gradient may reach them.

        Returns:
            (B,) float32, or None.
        """
        return None

    def bind(self, channels: Mapping[str, int]) -> None:
        """Receive the channels of the ``hidden`` modules by their names, once the denoiser is built."""

    def at(self, samples: int) -> None:
        """Set the training samples seen so far."""
        self.samples = samples

    def on_step(self) -> None:
        """Update what is not trained by gradients, once an optimizer step is complete."""

    def prepare(self) -> None:
        """Read files that only training needs; whatever runs a trained stage does without them.

        Raises:
            FileNotFoundError: If there are none.
        """

    def validate_size(self, size: int) -> None:
        """Check the side of the images before training.

        Raises:
            ValueError: If the term cannot use it.
        """
