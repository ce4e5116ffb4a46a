"""Sets of features without a network, for the tests of measures."""

import torch

from ldm.distributed.group import SingleProcess
from ldm.metrics.features import FeatureSet


def normal(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(count, width, seed):
    return torch.nn.functional.normalize(normal(count, width, seed), dim=1)


def feature_set(needs, num_splits=1, **views):
    """A set of rows in their order, given in two batches."""
    found = FeatureSet(needs, num_splits)
    count = len(next(iter(views.values())))
    for rows in (range(count // 3), range(count // 3, count)):
        indices = torch.tensor(list(rows), dtype=torch.int64)
        found.add({name: values[indices] for name, values in views.items()}, indices)
    found.sync(SingleProcess())
    return found


def compute(measure, generated, real=None):
    """Values of a measure; sets are given as {view: rows}."""
    return measure.compute(
        feature_set(measure.generated, **generated), feature_set(measure.real, 2, **(real or generated))
    )
