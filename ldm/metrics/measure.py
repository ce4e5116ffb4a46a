"""What is computed from the features of two sets of pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ldm.metrics.features import FeatureSet, Needs
from ldm.metrics.metric import Says


class Measure(ABC):
    """Computes numbers from generated and real features; it never sees a picture.

    Attributes:
        generated: What it needs of the generated pictures.
        real: What it needs of the real ones.
    """

    generated: Needs = Needs()
    real: Needs = Needs()

    @abstractmethod
    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return the values by name.

        Raises:
            ValueError: If there are too few pictures.
        """

    def says(self) -> Says:
        """Say which settings the values depend on."""
        return {}
