"""How often training visits which timesteps."""

import math
from fractions import Fraction

import pytest
import torch

from ldm.diffusion.objective import Objective
from ldm.diffusion.times import LogitNormal, LowDiscrepancy, UniformTimes
from ldm.rng import SampleNoise

X0 = torch.zeros(4000, 1)


def draw(times, position, seed=0):
    keys = [f"{seed}/{i}" for i in range(len(position))]
    return Objective(times=times).draw(X0[: len(position)], SampleNoise(seed, keys), position)[0]


def test_the_logit_of_a_logit_normal_time_is_normal():
    times = LogitNormal(mean=-0.5, std=0.8)
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    logit = torch.logit(times.quantile(u))
    assert logit.mean().item() == pytest.approx(-0.5, abs=1e-4)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-3)
    assert torch.equal(times.quantile(u), times.quantile(u).sort().values)  # an inverse of a CDF rises


@pytest.mark.parametrize("times", [LogitNormal(1.0, 0.5), LowDiscrepancy(LogitNormal(1.0, 0.5))])
def test_training_draws_from_the_distribution(times):
    """Shares below the quartiles of the logit, 1 - 0.6745 / 2, 1 and 1 + 0.6745 / 2."""
    t = draw(times, torch.arange(4000)).double() / 1000
    for share, logit in ((0.25, 1 - 0.6745 / 2), (0.5, 1.0), (0.75, 1 + 0.6745 / 2)):
        below = (t < 1 / (1 + math.exp(-logit))).double().mean().item()
        assert below == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5 + 1e-3)


def test_a_median_number_gives_the_median_time():
    assert LogitNormal(mean=1.0).quantile(torch.tensor([0.5]).double()).item() == pytest.approx(
        1 / (1 + math.e**-1)
    )


@pytest.mark.parametrize(
    "times", [UniformTimes(), LogitNormal(), LogitNormal(100.0), LowDiscrepancy(LogitNormal(-100.0))]
)
def test_times_stay_within_the_table(times):
    t = draw(times, torch.arange(4000))
    assert t.min() >= 0 and t.max() <= 999
    ends = torch.tensor([0.0, 1 - 2**-24]).double()
    assert ((times.quantile(ends) >= 0) & (times.quantile(ends) < 1)).all()


def test_an_even_sequence_fills_every_stretch_of_the_stream():
    """Star discrepancy: the largest miss of a count, over n; about n**-0.5 for independent numbers."""
    for start in (0, 12_345, 10**9):
        for count in (16, 256, 4000):
            t = draw(LowDiscrepancy(), start + torch.arange(count)).double() / 1000
            misses = (t.sort().values - torch.arange(count) / count).abs()
            assert misses.max() < 3 * math.log(count) / count


def test_even_times_are_multiples_of_the_golden_ratio():
    position = torch.arange(10**9, 10**9 + 100)
    golden = Fraction(math.isqrt(5 * 10**60), 2 * 10**30) - Fraction(1, 2)
    exact = [int(1000 * (p * golden % 1)) for p in position.tolist()]
    assert draw(LowDiscrepancy(), position).tolist() == exact


def test_even_times_do_not_depend_on_batch_or_processes():
    whole = draw(LowDiscrepancy(), 100 + torch.arange(64))
    halves = [draw(LowDiscrepancy(), 100 + torch.arange(rank, 64, 2), seed=rank) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(), whole)


def test_outside_of_training_times_are_uniform_and_independent():
    for times in (LogitNormal(5.0), LowDiscrepancy()):
        assert torch.equal(
            Objective(times=times).draw(X0, SampleNoise(0, ["a"] * 4000))[0],
            Objective().draw(X0, SampleNoise(0, ["a"] * 4000))[0],
        )


def test_impossible_deviations_are_refused():
    with pytest.raises(ValueError, match=r"objective\.times\.std must be > 0, got 0"):
        LogitNormal(std=0)
