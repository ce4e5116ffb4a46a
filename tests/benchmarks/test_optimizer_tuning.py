"""The benchmark of optimizers tunes each alike."""

from __future__ import annotations

import math

import pytest

optimizers = pytest.importorskip("benchmarks.optimizers")


@pytest.mark.parametrize("best", [2.0**-20, 2.0**-9, 2.0**-3])
def test_tuning_ends_with_larger_losses_on_both_sides(best):
    losses = optimizers.tuned(2.0**-9, lambda rate: abs(math.log2(rate / best)))
    assert min(losses, key=losses.get) == best
    assert min(losses) < best < max(losses)
    assert {2.0**-10, 2.0**-9, 2.0**-8} <= set(losses)


def test_a_rate_that_diverges_is_no_choice():
    losses = optimizers.tuned(
        2.0**-9, lambda rate: math.inf if rate > 2.0**-10 else abs(math.log2(rate) + 11)
    )
    assert min(losses, key=losses.get) == 2.0**-11
