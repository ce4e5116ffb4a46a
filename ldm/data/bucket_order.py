"""The order of samples in buckets: a pure function of (seed, global batch size), with random access.

Each global batch of M samples is of one bucket. A bucket with n samples is an endless stream of its own, in
the order of ``ldm.data.order``; its batches are the stream's next M samples, so what is left at the end of
its epoch begins the next one, and no sample is left out. An epoch of all buckets has P rounds. The first r
rounds hold floor(r n / (M P)) batches of a bucket: it is always within a batch of its share, and all buckets
are through with an epoch together, up to less than a batch each. The batches of a round are shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data.order import Order, permutation

ROUND = 1024
"""Batches that are shuffled together, about: more need more time and memory at each seek."""
_TAG = 0xB0C4E7


@dataclass(frozen=True)
class _Round:
    number: int
    start: int
    """Global batches before it."""
    buckets: np.ndarray
    """Bucket of each of its batches, in order."""
    batches: np.ndarray
    """Which batch of the bucket's stream each is."""


class BucketOrder:
    """Maps a global position to (shard, bucket, number among the shard's samples of the bucket).

    With one bucket it is ``Order``. All buckets take the shards in the same order, so a shard is read by all
    at about the same time.

    Args:
        counts: (S, G) number of samples of each shard in each bucket.
        seed: Seed of the order.
        group_shards: Shards that are permuted jointly.
        batch_size: M, samples of a global batch, over all processes.

    Raises:
        ValueError: If there are no samples.
    """

    def __init__(self, counts: np.ndarray, seed: int, group_shards: int, batch_size: int) -> None:
        self.counts, self.seed = np.asarray(counts, dtype=np.int64), seed
        self.group_shards, self.batch_size = group_shards, batch_size
        self.totals: list[int] = self.counts.sum(axis=0).tolist()
        if batch_size < 1 or not len(self):
            raise ValueError(
                f"batch_size: got {batch_size} for {len(self)} samples, expected at least 1 of each"
            )
        self.num_rounds = -(-len(self) // (batch_size * ROUND))
        """P, rounds of an epoch."""
        self._orders: dict[int, Order] = {}
        self._round: _Round | None = None

    def __len__(self) -> int:
        return sum(self.totals)

    def bucket(self, position: int) -> int:
        """Return the bucket of the sample at a global position >= 0."""
        return self._place(position)[0]

    def locate(self, position: int, ahead: int = 0) -> tuple[int, int, int]:
        """Return (shard, bucket, number among the shard's samples of the bucket).

        Args:
            position: Global position >= 0.
            ahead: Samples of the bucket's stream to pass over: those that cannot be used.
        """
        bucket, place = self._place(position)
        shard, row = self._order(bucket).locate(place + ahead)
        return shard, bucket, row

    def upcoming(self, position: int) -> tuple[list[int], list[int]]:
        """Return the shards of the group that a position is in, and those of the next group."""
        bucket, place = self._place(position)
        return self._order(bucket).upcoming(place)

    def _place(self, position: int) -> tuple[int, int]:
        """Return the bucket of a global position, and the position in the bucket's stream."""
        if len(self.totals) == 1:
            return 0, position
        batch, within = divmod(position, self.batch_size)
        bucket, number = self._batch(batch)
        return bucket, number * self.batch_size + within

    def _order(self, bucket: int) -> Order:
        if bucket not in self._orders:
            self._orders[bucket] = Order(self.counts[:, bucket], self.seed, self.group_shards)
        return self._orders[bucket]

    def _batch(self, batch: int) -> tuple[int, int]:
        """Return the bucket of a global batch, and which of the bucket's batches it is."""
        found = self._round
        if found is None or not found.start <= batch < found.start + len(found.buckets):
            self._round = found = self._shuffle(self._number(batch))
        return int(found.buckets[batch - found.start]), int(found.batches[batch - found.start])

    def _before(self, number: int) -> list[int]:
        """Count the batches of each bucket before a round."""
        return [number * total // (self.batch_size * self.num_rounds) for total in self.totals]

    def _number(self, batch: int) -> int:
        """Find the round of a global batch."""
        number = batch * self.batch_size * self.num_rounds // len(self)  # were no batch rounded off
        while sum(self._before(number + 1)) <= batch:
            number += 1
        return number

    def _shuffle(self, number: int) -> _Round:
        """Shuffle a round's batches; those of a bucket keep their order."""
        before, after = self._before(number), self._before(number + 1)
        counts = np.subtract(after, before)
        buckets = np.repeat(np.arange(len(counts)), counts)
        buckets = buckets[permutation(len(buckets), self.seed, _TAG, number)]
        batches = np.empty(len(buckets), dtype=np.int64)
        for bucket in np.flatnonzero(counts):
            batches[buckets == bucket] = np.arange(before[bucket], after[bucket])
        return _Round(number, sum(before), buckets, batches)
