"""Shares of work on matrices: balanced, each done once."""

import pytest
import torch

from ldm.distributed.spread import share_out
from ldm.nets.unet import UNet
from ldm.optim.muon import multiplications
from ldm.types import DenoiserDims


def loads(costs, num):
    shares = share_out(costs, num)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    return [sum(costs[i] for i in share) for share in shares]


def test_every_process_gets_its_part_and_none_is_more_than_a_third_above_the_best():
    generator = torch.Generator().manual_seed(0)
    for num in (1, 2, 3, 8):
        costs = torch.rand(40, generator=generator).tolist()
        found = loads(costs, num)
        assert sum(found) == pytest.approx(sum(costs)) and min(found) > 0
        assert max(found) <= 4 / 3 * max(sum(costs) / num, *costs)  # Graham 1969
    assert share_out([1.0, 1.0], 3) == [[0], [1], []] and share_out([], 2) == [[], []]


@pytest.mark.parametrize(("num", "over_mean"), [(8, 1.001), (64, 1.64), (512, 13.1)])
def test_shares_of_stable_diffusion_are_balanced_as_far_as_matrices_go(num, over_mean):
    with torch.device("meta"):
        unet = UNet(DenoiserDims(sample=4, tokens=768))
    costs = [multiplications(p.shape[0], p.shape[1:].numel()) for p in unet.parameters() if p.ndim >= 2]
    assert 2 * sum(costs) == pytest.approx(14.16e12, rel=1e-3)  # FLOP, counted by torch
    found = loads(costs, num)
    assert max(found) < over_mean * sum(found) / num
    assert (
        max(found) == max(costs) or num == 8
    )  # beyond 39 processes the largest matrix is more than the mean
