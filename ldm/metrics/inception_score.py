"""Inception score: confidence of a classifier on each image, and diversity over all images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm.metrics.features import FeatureSet, FeatureSpec
from ldm.metrics.measure import Measure
from ldm.metrics.metric import Metadata


class InceptionScore(Measure):
    """exp E KL(p(y | x) || p(y)) (Salimans et al. 2016, arXiv:1606.03498), averaged over splits.

    Between 1 and the number of classes. The split is torch-fidelity's for the same seed.

    Args:
        num_splits: Parts of the set that p(y) is taken over; the value depends on it.
        seed: Seed of the order in which images are split.
    """

    def __init__(self, num_splits: int = 10, seed: int = 2020) -> None:
        self.num_splits = num_splits
        self.higher_is_better = {"is": True}
        self.seed = seed
        self.generated = FeatureSpec(rows=frozenset({"logits"}))

    def compute(self, generated: FeatureSet, real: FeatureSet) -> dict[str, float]:
        """Return ``is`` and ``is_std``, the deviation over splits."""
        logits = generated.rows("logits")
        count = len(logits)
        if count < self.num_splits:
            raise ValueError(
                f"is: got {count} images for {self.num_splits} splits, expected at least as many"
            )
        order = torch.from_numpy(np.random.RandomState(self.seed).permutation(count))
        logits = logits[order.to(logits.device)]
        bounds = [i * count // self.num_splits for i in range(self.num_splits + 1)]
        scores = [_score(logits[low:high]) for low, high in pairwise(bounds)]
        return {"is": float(np.mean(scores)), "is_std": float(np.std(scores))}

    def metadata(self) -> Metadata:
        """Name the splits."""
        return {"splits": self.num_splits, "seed_of_splits": self.seed}


def _score(logits: Tensor) -> float:
    log_p = logits.log_softmax(1)
    log_q = log_p.logsumexp(0) - np.log(len(log_p))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean().exp())
