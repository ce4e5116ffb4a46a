"""Counts of an evaluation's captions that a text tower truncates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ldm.distributed.group import Group
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.metric import Metadata, Metric
from ldm.nets.text import truncated
from ldm.types import Batch


def readers(name: str, context_length: int | None, metrics: Sequence[Metric]) -> dict[str, int]:
    """List what reads the captions of a candidate, with the most tokens that it reads.

    Args:
        name: Of the model that draws for them.
        context_length: Its tokens; None if it reads none.
        metrics: What measures.
    """
    found = {} if context_length is None else {name: context_length}
    for metric in metrics:
        if isinstance(metric, FeatureMetrics) and metric.context_length is not None:
            found[f"the extractor {metric.extractor.name}"] = metric.context_length
    return found


class TruncatedCaptions:
    """Counts the captions that are cut off.

    Args:
        readers: What reads them, with the most tokens that it reads, begin and end marks included.
    """

    def __init__(self, readers: Mapping[str, int]) -> None:
        self.readers = dict(readers)
        self._cut = torch.zeros(len(self.readers) + 1, dtype=torch.float64)

    def add(self, batch: Batch) -> None:
        """Count those of a batch."""
        if text := batch.get("text"):
            fractions = [truncated(text, tokens) for tokens in self.readers.values()]
            self._cut += torch.tensor([*fractions, 1.0], dtype=torch.float64) * len(text)

    def metadata(self, group: Group) -> Metadata:
        """Return the fraction that is cut, by the number of tokens, over all processes, which all call it."""
        *cut, count = group.all_reduce(self._cut).tolist()
        self._fractions = {name: n / count for name, n in zip(self.readers, cut, strict=True) if count}
        return {
            f"truncated_captions@{self.readers[name]}": fraction for name, fraction in self._fractions.items()
        }

    def warning(self) -> str | None:
        """Say what is cut, once ``metadata`` is known; None if nothing is."""
        cut = [
            f"{fraction:.0%} to the {self.readers[name]} tokens of {name}"
            for name, fraction in self._fractions.items()
            if fraction
        ]
        return f"captions are cut off: {', '.join(cut)}" if cut else None
