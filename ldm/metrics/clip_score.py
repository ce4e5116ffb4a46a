"""CLIP score: agreement of images with their captions."""

from __future__ import annotations

from types import MappingProxyType

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure


class CLIPScore(Measure):
    """Mean of 100 max(cos(image, caption), 0) (Hessel et al. 2021, arXiv:2104.08718, with w = 100)."""

    higher_is_better = MappingProxyType({"clip_score": True})
    generated = FeatureSpec(moments=frozenset({"agreement"}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``clip_score`` in [0, 100]."""
        return {"clip_score": 100.0 * float(generated.mean("agreement"))}
