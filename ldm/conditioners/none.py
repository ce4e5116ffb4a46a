"""No condition."""

from __future__ import annotations

from ldm.conditioners.base import Conditioner
from ldm.types import Batch, Cond


class Unconditional(Conditioner):
    """Conditions on nothing."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> Cond:
        """Return the empty condition."""
        return Cond()

    def null(self, batch: Batch) -> Cond:
        """Return the empty condition."""
        return Cond()
