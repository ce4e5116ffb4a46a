"""Interface of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.optim.recipes import Optimization
from ldm.types import Batch


class LossTerm(Configurable, nn.Module, ABC):
    """A term of a stage's loss, logged unweighted as ``train/<name>`` and ``val/<name>``.

    It may have parameters, e.g. a projector: they are trained and saved with the stage's, but neither
    averaged nor exported.

    Args:
        weight: Factor of the term in the loss.
        optimizer: Recipe of the term's own parameters; that of the stage unless given.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of the batch that the term needs in addition to those of the stage."""

    def __init__(self, weight: float = 1.0, optimizer: Optimization | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.optimizer = optimizer

    @abstractmethod
    def forward(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the term of each sample.

        Args:
            batch: B samples.
            outputs: What the stage computed from them, by the names that its docstring lists.

        Returns:
            (B,) float32.
        """
