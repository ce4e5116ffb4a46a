"""Distributions of the timesteps in training."""

import math
from fractions import Fraction

import pytest
import torch

from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.schedule import RectifiedFlow, ScaledLinear
from ldm.diffusion.timesteps import LogitNormal, LogNormal, LowDiscrepancy, UniformTimesteps
from ldm.diffusion.variance_exploding import VarianceExploding
from ldm.rng import SampleNoise

FINE = VarianceExploding(1_000_000)
X0 = torch.zeros(4000, 1)


def draw(times, position, seed=0):
    keys = [f"{seed}/{i}" for i in range(len(position))]
    return Objective(timesteps=times).draw(X0[: len(position)], SampleNoise(seed, keys), position)[0]


def test_the_logit_of_a_logit_normal_time_is_normal():
    times = LogitNormal(mean=-0.5, std=0.8)
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    t = times.quantile(u, FINE)
    logit = torch.logit((t + 0.5) / FINE.num_steps)
    assert logit.mean().item() == pytest.approx(-0.5, abs=1e-4)
    assert logit.std().item() == pytest.approx(0.8, abs=1e-3)
    assert torch.equal(t, t.sort().values)  # an inverse of a CDF rises


@pytest.mark.parametrize("times", [LogitNormal(1.0, 0.5), LowDiscrepancy(LogitNormal(1.0, 0.5))])
def test_training_draws_from_the_distribution(times):
    """Shares below the quartiles of the logit, 1 - 0.6745 / 2, 1 and 1 + 0.6745 / 2."""
    t = draw(times, torch.arange(4000)).double() / 1000
    for fraction, logit in ((0.25, 1 - 0.6745 / 2), (0.5, 1.0), (0.75, 1 + 0.6745 / 2)):
        below = (t < 1 / (1 + math.exp(-logit))).double().mean().item()
        assert below == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 4000) ** 0.5 + 1e-3)


def test_a_median_number_gives_the_median_time():
    median = torch.tensor([0.5]).double()
    time = LogitNormal(mean=1.0).quantile(median, FINE).item() / FINE.num_steps
    assert time == pytest.approx(1 / (1 + math.e**-1), abs=1 / FINE.num_steps)
    (level,) = FINE.levels(LogNormal(mean=-1.2).quantile(median, FINE))[1].tolist()
    assert level == pytest.approx(math.exp(-1.2))


@pytest.mark.parametrize(
    "times",
    [
        UniformTimesteps(),
        LogitNormal(),
        LogitNormal(100.0),
        LowDiscrepancy(LogitNormal(-100.0)),
        LogNormal(),
        LogNormal(100.0),
        LowDiscrepancy(LogNormal(-100.0)),
    ],
)
def test_times_stay_within_the_table(times):
    t = draw(times, torch.arange(4000))
    assert t.min() >= 0 and t.max() <= 999
    ends = torch.tensor([0.0, 1 - 2**-24]).double()
    assert ((times.quantile(ends, ScaledLinear()) >= 0) & (times.quantile(ends, ScaledLinear()) <= 999)).all()


@pytest.mark.parametrize("schedule", [VarianceExploding(), ScaledLinear(), RectifiedFlow()])
@pytest.mark.parametrize("times", [LogNormal(0.3, 0.5), LowDiscrepancy(LogNormal(0.3, 0.5))])
def test_the_log_of_a_log_normal_noise_level_is_normal_and_continuous(times, schedule):
    """Quartiles of N(mean, std**2) are mean -+ 0.6745 std; independent draws hit no level twice."""
    objective = Objective(schedule, Velocity(), timesteps=times)
    t, _ = objective.draw(X0, SampleNoise(0, [str(i) for i in range(4000)]), torch.arange(4000))
    assert t.dtype == torch.float32 and len(t.unique()) > 3900
    alpha, sigma = schedule.at(t, X0)
    log_level = (sigma / alpha).log().flatten().double()
    for fraction, quantile in ((0.25, 0.3 - 0.6745 * 0.5), (0.5, 0.3), (0.75, 0.3 + 0.6745 * 0.5)):
        below = (log_level < quantile).double().mean().item()
        assert below == pytest.approx(fraction, abs=5 * (fraction * (1 - fraction) / 4000) ** 0.5)


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
    full = draw(LowDiscrepancy(), 100 + torch.arange(64))
    halves = [draw(LowDiscrepancy(), 100 + torch.arange(rank, 64, 2), seed=rank) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(), full)


def test_outside_of_training_times_are_uniform_and_independent():
    for times in (LogitNormal(5.0), LogNormal(), LowDiscrepancy()):
        assert torch.equal(
            Objective(timesteps=times).draw(X0, SampleNoise(0, ["a"] * 4000))[0],
            Objective().draw(X0, SampleNoise(0, ["a"] * 4000))[0],
        )


def test_impossible_deviations_are_refused():
    for kind in (LogitNormal, LogNormal):
        with pytest.raises(ValueError, match=r"objective\.timesteps\.std must be > 0, got 0"):
            kind(std=0)
