"""CLIP's step and open_clip's give equal gradients in the benchmark, at once and in parts."""

import copy

import pytest
import torch

from benchmarks.contrastive import NUMBERS, Theirs, gradients, ours, peak, samples, stage


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_both_compute_the_same(bias, micro_batch):
    batch, mine = samples(6), stage(bias, micro_batch)
    theirs = Theirs(copy.deepcopy(mine.net.model), batch, micro_batch)
    losses = ours(mine, batch)(), theirs.step()
    assert torch.allclose(*losses, rtol=1e-6)
    one, two = gradients(mine.net.model), gradients(theirs.model)
    assert one.keys() == two.keys()
    largest = max(float(value.abs().max()) for value in two.values())
    parts = len(theirs.parts)
    for name, value in two.items():
        times = parts if name in NUMBERS else 1  # theirs adds these up once for each part
        assert torch.allclose(times * one[name], value, atol=1e-5 * largest), name


def test_peak_counts_what_is_freed_again():
    def step():
        torch.ones(1 << 20)
        return torch.ones(1 << 10)

    assert peak(step) == pytest.approx(4 << 20, rel=0.01)
