"""Batches of one bucket each: nothing lost, the same order for all, with a seek."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.bucket_order import BucketOrder
from ldm.data.order import Order
from ldm.data.source import DataRank, rank_batches

COUNTS = np.array([[5, 0, 2], [1, 3, 0], [9, 4, 1], [0, 0, 7], [6, 8, 1]])
TOTAL = int(COUNTS.sum())


@st.composite
def stores(draw):
    shards, buckets = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    cells = draw(st.lists(st.integers(0, 12), min_size=shards * buckets, max_size=shards * buckets))
    counts = np.array(cells).reshape(shards, buckets)
    counts[0, 0] += 1
    batch_size = draw(st.integers(1, min(9, int(counts.sum()))))
    return counts, draw(st.integers(0, 3)), draw(st.integers(1, 4)), batch_size


@settings(max_examples=60, deadline=None)
@given(stores(), st.integers(1, 4))
def test_batches_are_of_one_bucket_and_lose_nothing(store, epochs):
    """After E epochs a bucket of n samples gave floor(E n / M) batches, all samples equally often."""
    counts, _, _, batch_size = store
    order = BucketOrder(*store)
    given_batches = [epochs * n // batch_size for n in counts.sum(axis=0).tolist()]
    found: dict[int, Counter[tuple[int, int]]] = {}
    for batch in range(sum(given_batches)):
        located = [order.locate(batch * batch_size + i) for i in range(batch_size)]
        assert {bucket for _, bucket, _ in located} == {order.bucket(batch * batch_size)}
        found.setdefault(located[0][1], Counter()).update((shard, row) for shard, _, row in located)
    for bucket, batches in enumerate(given_batches):
        of_bucket = found.get(bucket, Counter())
        assert of_bucket.total() == batches * batch_size
        everything = {(s, k) for s, n in enumerate(counts[:, bucket]) for k in range(n)}
        assert set(of_bucket) <= everything
        if everything and of_bucket:
            complete, _ = divmod(of_bucket.total(), len(everything))
            assert all(complete <= of_bucket[sample] <= complete + 1 for sample in everything)


@settings(max_examples=30, deadline=None)
@given(stores(), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_a_position_means_the_same_however_it_is_reached(store, positions):
    order = BucketOrder(*store)
    for position in positions:
        assert BucketOrder(*store).locate(position) == order.locate(position)


def test_one_bucket_is_the_order_without_buckets():
    counts = [5, 1, 9, 3]
    ours, plain = BucketOrder(np.array([counts]).T, 3, 2, 4), Order(counts, 3, 2)
    for position in range(100):
        shard, bucket, row = ours.locate(position)
        assert (shard, row, bucket) == (*plain.locate(position), 0)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_any_number_of_processes_reads_the_same_batches(world):
    order = BucketOrder(COUNTS, 7, 2, 6)
    streams = [rank_batches(0, 6 // world, DataRank(rank, world)) for rank in range(world)]
    for number in range(40):
        of_batch = sorted(position for stream in streams for position in next(stream))
        assert of_batch == list(range(6 * number, 6 * number + 6))
        assert len({order.bucket(position) for position in of_batch}) == 1


def test_an_unusable_sample_is_replaced_within_its_bucket():
    order = BucketOrder(COUNTS, 7, 2, 4)
    for position in range(60):
        assert {order.locate(position, ahead)[1] for ahead in range(9)} == {order.bucket(position)}
        if position % 4 < 3:
            assert order.locate(position, 1) == order.locate(position + 1)


def test_many_rounds_keep_each_bucket_within_a_batch_of_its_share():
    counts = np.array([[40_000, 9_000, 700, 3]])
    order = BucketOrder(counts, 0, 1, 10)
    assert order.num_rounds == 5
    for number in range(1, 11):
        before = order._before(number)
        for batches, total in zip(before, order.totals, strict=True):
            assert 0 <= number * total / 50 - batches < 1
    batches = [order._batch(batch) for batch in range(sum(order._before(10)))]
    for bucket, total in enumerate(order.totals):
        assert [n for b, n in batches if b == bucket] == list(range(2 * total // 10))


def test_seeds_and_rounds_differ_and_buckets_are_mixed():
    counts = np.array([[20_000, 20_000]])
    first = [BucketOrder(counts, 0, 1, 10).bucket(10 * batch) for batch in range(2000)]
    other = [BucketOrder(counts, 1, 1, 10).bucket(10 * batch) for batch in range(2000)]
    assert first != other
    assert first[:1000] != first[1000:]
    runs = sum(a != b for a, b in pairwise(first))
    assert 900 < runs < 1100  # as of 1999 fair coins: within 4.5 standard deviations


def test_a_large_store_seeks_at_once():
    order = BucketOrder(np.full((10_000, 20), 500), 0, 8, 256)
    shard, bucket, row = order.locate(98_765_432)
    assert (0 <= shard < 10_000, 0 <= bucket < 20, 0 <= row < 500) == (True, True, True)
    assert order._round is not None
    assert len(order._round.buckets) <= 1024 + 20
    assert list(order._orders) == [bucket]


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="batch_size: got 0 for 4 samples"):
        BucketOrder(np.array([[1, 3]]), 0, 1, 0)
    with pytest.raises(ValueError, match="for 0 samples"):
        BucketOrder(np.zeros((2, 3)), 0, 1, 1)
