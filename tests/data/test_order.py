"""The order of training samples: a permutation per epoch, the same for all, with a seek."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ldm.data.order import Order, mix, permutation

COUNTS = [5, 1, 9, 3, 7, 2, 8]
TOTAL = sum(COUNTS)


def epoch_of(order: Order, number: int) -> list[tuple[int, int]]:
    return [order.locate(position) for position in range(number * TOTAL, (number + 1) * TOTAL)]


@pytest.mark.parametrize("group_shards", [1, 2, 3, 7, 100])
def test_each_epoch_holds_each_sample_once(group_shards):
    order = Order(COUNTS, 3, group_shards)
    everything = {(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)}
    epochs = [epoch_of(order, number) for number in range(4)]
    assert all(set(epoch) == everything and len(epoch) == TOTAL for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_position_means_the_same_however_it_is_reached():
    order = Order(COUNTS, 3, 2)
    straight = [order.locate(position) for position in range(3 * TOTAL)]
    for position in np.random.default_rng(0).permutation(3 * TOTAL)[:60].tolist():
        assert Order(COUNTS, 3, 2).locate(position) == order.locate(position) == straight[position]
    assert order.locate(10**12) == Order(COUNTS, 3, 2).locate(10**12)


def test_seeds_differ():
    assert epoch_of(Order(COUNTS, 0, 2), 0) != epoch_of(Order(COUNTS, 1, 2), 0)


def test_only_the_shards_of_one_group_are_read_at_a_time():
    order = Order([10] * 12, 0, 3)
    shards = [order.locate(position)[0] for position in range(120)]
    groups = [set(shards[start : start + 30]) for start in range(0, 120, 30)]
    assert [len(group) for group in groups] == [3] * 4
    assert set.union(*groups) == set(range(12))
    assert shards[:10] != sorted(shards[:10])


def test_permutations_are_uniform():
    """Each of the 24 orders of 4 things comes up equally often: chi-squared with 23 degrees of freedom."""
    counts = Counter(tuple(permutation(4, 1, epoch).tolist()) for epoch in range(4800))
    chi = sum((counts[key] - 200) ** 2 / 200 for key in counts)
    assert len(counts) == 24
    assert chi < 49.7  # exceeded once in a thousand


def test_the_hash_is_splitmix64_and_fixed():
    """The first numbers of the reference implementation for state 0; a run's order hangs on them."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert permutation(8, 0).tolist() == permutation(8, 0).tolist()
    assert permutation(8, 7, 1, 2).tolist() == [int(i) for i in _reference(8, 7, 1, 2)]


def _reference(count: int, *key: int) -> list[int]:
    """The same in plain Python."""
    start, mask = mix(*key), (1 << 64) - 1
    values = []
    for i in range(count):
        z = (start + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        values.append(z ^ (z >> 31))
    return sorted(range(count), key=values.__getitem__)


def test_a_large_store_seeks_at_once():
    order = Order([10_000] * 10_000, 0, 8)
    assert 0 <= order.locate(98_765_432)[1] < 10_000
    assert order._group is not None and len(order._group.rows) == 80_000


def test_empty_shards_are_passed_over():
    order, full = Order([0, 3, 0, 0, 2, 0], 0, 2), {(1, 0), (1, 1), (1, 2), (4, 0), (4, 1)}
    for epoch in range(4):
        assert {order.locate(5 * epoch + i) for i in range(5)} == full


def test_orders_and_groups_of_nothing_are_refused():
    with pytest.raises(ValueError, match="counts"):
        Order([], 0, 1)
    with pytest.raises(ValueError, match="counts"):
        Order([0, 0], 0, 1)
    with pytest.raises(ValueError, match="group_shards: got 0"):
        Order([3], 0, 0)
