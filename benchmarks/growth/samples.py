"""What may grow with samples: their order, buckets, mixtures, and the position where a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from benchmarks.growth.line import Case
from benchmarks.growth.measure import each, seconds, traced
from ldm.data.bucket_order import ROUND, BucketOrder
from ldm.data.mixture import Mixture
from ldm.data.order import Order

PER_SHARD, BATCH, GROUP = 10_000, 256, 8
SHARES = 0.75 ** np.arange(20)
"""Of 20 buckets; each has 3/4 of the samples of the one before it."""
LOCATED = 2_000
"""Samples in a row whose time is measured."""
RESUMED = 10**6
"""Samples of an epoch of the runs that go on at any position."""
Make = Callable[[int], Order | BucketOrder]
"""Makes the order of so many samples."""


def shard_counts(samples: int) -> np.ndarray:
    """Return the samples of each shard: PER_SHARD, or all in one."""
    return np.full(max(1, samples // PER_SHARD), min(samples, PER_SHARD))


def plain(samples: int) -> Order:
    """Make the order of so many samples."""
    return Order(shard_counts(samples), 0, GROUP)


def bucketed(samples: int) -> BucketOrder:
    """Make their order in buckets."""
    counts = np.ceil(shard_counts(samples)[:, None] * SHARES / SHARES.sum()).astype(np.int64)
    return BucketOrder(counts, 0, GROUP, BATCH)


def _first(make: Make, samples: int) -> Order | BucketOrder:
    order = make(samples)
    order.locate(0)
    return order


def _planned(make: Make, samples: int) -> Order | BucketOrder:
    """Make an order whose epoch is planned, in all buckets."""
    order = make(samples)
    for position in range(0, BATCH * ROUND, BATCH):
        order.locate(position)
    return order


def _elsewhere(make: Make, samples: int) -> float:
    """Return seconds to find a sample of another group, in an epoch that is planned."""
    order = _planned(make, samples)
    places = iter((samples // 2, samples - 1, samples // 3))
    return seconds(lambda: order.locate(next(places)))


def _next(make: Make, samples: int) -> float:
    """Return seconds to find a sample that follows the one before it."""
    order = _planned(make, samples)
    positions = iter(range(BATCH * ROUND, BATCH * ROUND + 3 * LOCATED))
    return each(lambda: order.locate(next(positions)), LOCATED)


def _mixed(position: int) -> float:
    def resume() -> None:
        mixture = Mixture({"photos": 0.7, "drawings": 0.2, "maps": 0.1}, 0)
        mixture.locate(position)
        mixture.counts(position)

    return seconds(resume)


def cases(sizes: Sequence[int]) -> list[Case]:
    """List what is measured.

    Args:
        sizes: Samples, and positions, growing.
    """
    full = [size for size in sizes if size >= 10 * GROUP * PER_SHARD]  # of fewer a group may be cut
    full = full if len(full) > 1 else list(sizes)
    found = []
    ways: dict[str, Make] = {"order": plain, "order in 20 buckets": bucketed}
    for name, make in ways.items():
        found += [
            Case(f"{name}: first sample", "samples", 1, "s", sizes, _timed(make)),
            Case(f"{name}: memory", "samples", 1, "MB", sizes, _sized(make)),
            Case(f"{name}: a sample elsewhere", "samples", 0, "s", full, partial(_elsewhere, make)),
            Case(f"{name}: the next sample", "samples", 0, "s", full, partial(_next, make), 2e-6),
            Case(f"{name}: resume", "positions", 0, "s", sizes, _resumed(make)),
        ]
    return [*found, Case("mixture of 3: resume", "positions", 0, "s", sizes, _mixed)]


def _timed(make: Make) -> Callable[[int], float]:
    return lambda samples: seconds(lambda: _first(make, samples))


def _sized(make: Make) -> Callable[[int], float]:
    return lambda samples: traced(lambda: _first(make, samples))


def _resumed(make: Make) -> Callable[[int], float]:
    return lambda position: seconds(lambda: make(RESUMED).locate(position))
