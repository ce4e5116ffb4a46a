"""Measures of two sets of images, computed from their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.metric import Metadata


class Measure(ABC):
    """Computes numbers from generated and real features, without images.

    Attributes:
        generated: Features that it needs of the generated images.
        real: Features that it needs of the real ones.
        higher_is_better: As of a ``Metric``, by the names that ``compute`` gives.
    """

    generated: FeatureSpec = FeatureSpec()
    real: FeatureSpec = FeatureSpec()
    higher_is_better: Mapping[str, bool] = MappingProxyType({})

    @abstractmethod
    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return the values by name.

        Raises:
            ValueError: If there are too few images.
        """

    def metadata(self) -> Metadata:
        """Return the settings that the values depend on."""
        return {}
