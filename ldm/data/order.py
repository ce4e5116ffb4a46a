"""The order of training samples: a pure function of (seed, epoch), with random access.

Samples have a global position p = 0, 1, 2, ... without end; epoch p // N holds each of the N samples once.
In an epoch the shards are shuffled, consecutive groups of K shards are permuted together (so that reading
stays near-sequential), and only the number of samples per shard must be known. The permutations come from
the hash below and not from a library's generator, so that no upgrade changes the order of a run under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """Hash integers to one of 64 bits: splitmix64 (Steele et al. 2014), chained over ``values``."""
    state = 0
    for value in values:
        state = _finalize((state ^ (value & _MASK)) + _GOLDEN & _MASK)
    return state


def _finalize(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def permutation(count: int, *key: int) -> np.ndarray:
    """Permute range(count): sort it by the splitmix64 stream that starts at the hash of ``key``."""
    return np.argsort(stream(count, *key), kind="stable")


def stream(count: int, *key: int) -> np.ndarray:
    """Return the splitmix64 stream that starts at the hash of ``key``: (count,) uint64."""
    return hashed(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(*key)))


def hashed(z: np.ndarray) -> np.ndarray:
    """Hash an array of uint64, as ``mix`` does: a bijection."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class _Epoch:
    number: int
    shards: np.ndarray
    """(S,) shards in the order of this epoch."""
    ends: np.ndarray
    """(S,) samples up to and including each of them."""


@dataclass(frozen=True)
class _Group:
    start: int
    """Global position of its first sample."""
    shards: np.ndarray
    """(n,) shard of each of its samples, in the order they are read."""
    rows: np.ndarray
    """(n,) row of each in its shard."""

    def __contains__(self, position: int) -> bool:
        return self.start <= position < self.start + len(self.rows)


class Order:
    """Maps a global position to (shard, row).

    Args:
        counts: Number of samples of each shard; some may be 0.
        seed: Seed of the order.
        group_shards: K, the number of shards permuted jointly.

    Raises:
        ValueError: If ``counts`` holds no sample or a negative number, or ``group_shards`` is below 1.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, group_shards: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self._total = int(self.counts.sum())  # once: it is needed for each sample
        if not self._total or self.counts.min() < 0:
            raise ValueError(f"counts: got {list(counts)!r:.80}, expected at least one sample")
        if group_shards < 1:
            raise ValueError(f"group_shards: got {group_shards}, expected at least 1")
        self.seed = seed
        self.group_shards = group_shards
        self._epoch: _Epoch | None = None
        self._group: _Group | None = None

    def __len__(self) -> int:
        return self._total

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, row in the shard) of the sample at a global position >= 0."""
        group = self._group
        if group is None or position not in group:
            self._group = group = self._permute(position)
        index = position - group.start
        return int(group.shards[index]), int(group.rows[index])

    def upcoming(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of the group that a position is in, and those of the next group."""
        number, within = divmod(position, len(self))
        epoch, size = self._plan(number), self.group_shards
        first = int(np.searchsorted(epoch.ends, within, side="right"))
        first -= first % size
        now, later = epoch.shards[first : first + size], epoch.shards[first + size : first + 2 * size]
        if not len(later):
            later = permutation(len(self.counts), self.seed, number + 1)[:size]
        return now.tolist(), later.tolist()

    def _plan(self, number: int) -> _Epoch:
        if self._epoch is None or self._epoch.number != number:
            shards = permutation(len(self.counts), self.seed, number)
            self._epoch = _Epoch(number, shards, np.cumsum(self.counts[shards]))
        return self._epoch

    def _permute(self, position: int) -> _Group:
        """Permute the samples of the group that a position is in."""
        number, within = divmod(position, len(self))
        epoch = self._plan(number)
        first = int(np.searchsorted(epoch.ends, within, side="right"))
        first -= first % self.group_shards
        start = int(epoch.ends[first - 1]) if first else 0
        shards = epoch.shards[first : first + self.group_shards]
        ends = epoch.ends[first : first + self.group_shards] - start
        offsets = permutation(int(ends[-1]), self.seed, number, first + 1)
        which = np.searchsorted(ends, offsets, side="right")
        rows = offsets - (ends - self.counts[shards])[which]
        return _Group(position - within + start, shards[which], rows)
