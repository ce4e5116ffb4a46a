import copy
import math

import diffusers
import pytest
import torch
from torch import nn

from ldm.diffusion.schedule import (
    Cosine,
    Linear,
    RectifiedFlow,
    ScaledLinear,
    Schedule,
    ZeroTerminalSNR,
    of_betas,
)
from ldm.diffusion.variance_exploding import VarianceExploding

SCHEDULES = [Linear(), ScaledLinear(), Cosine(), Linear(50, 0.002, 0.3), Cosine(10)]
PRESERVING = [*SCHEDULES, ZeroTerminalSNR(ScaledLinear()), ZeroTerminalSNR(Cosine(50))]


@pytest.mark.parametrize("schedule", PRESERVING)
def test_variance_preserving_and_monotone(schedule):
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    assert torch.allclose(
        schedule.alpha**2 + schedule.sigma**2, torch.ones(schedule.num_steps).double(), atol=1e-15
    )
    assert (schedule.alpha.diff() < 0).all() and (schedule.noise_level.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_form_is_the_composition_of_single_steps(schedule):
    """Ho et al. 2020, Eq. 2 applied t + 1 times has the mean and variance of Eq. 4."""
    beta = 1 - (schedule.alpha / torch.cat([torch.ones(1).double(), schedule.alpha[:-1]])) ** 2
    mean, variance = 1.0, 0.0
    for t in range(schedule.num_steps):
        mean, variance = math.sqrt(1 - beta[t]) * mean, (1 - beta[t]) * variance + beta[t]
        assert mean == pytest.approx(schedule.alpha[t].item(), rel=1e-9)
        assert variance == pytest.approx(schedule.sigma[t].item() ** 2, rel=1e-9)


def test_betas_of_the_papers():
    linear, scaled = Linear(), ScaledLinear()
    assert linear.sigma[0] ** 2 == pytest.approx(1e-4)
    assert 1 - (linear.alpha[-1] / linear.alpha[-2]) ** 2 == pytest.approx(0.02)
    assert scaled.sigma[0] ** 2 == pytest.approx(0.00085)
    assert 1 - (scaled.alpha[-1] / scaled.alpha[-2]) ** 2 == pytest.approx(0.012)
    # Lin et al. 2023 (arXiv:2305.08891), Table 1, sqrt(abar_T).
    assert linear.alpha[-1] == pytest.approx(0.006353, rel=1e-3)
    assert scaled.alpha[-1] == pytest.approx(0.068265, rel=1e-4)
    assert Cosine().alpha[-1] == pytest.approx(4.928e-05, rel=1e-3)


def test_cosine_is_eq_17_until_the_cut():
    schedule, time = Cosine(100), (torch.arange(1, 100).double() / 100 + 0.008) / 1.008 * math.pi / 2
    start = math.cos(0.008 / 1.008 * math.pi / 2)
    assert torch.allclose(schedule.alpha[:99], time.cos() / start, rtol=1e-10)
    assert 1 - (schedule.alpha[-1] / schedule.alpha[-2]) ** 2 == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("ours", "name", "betas"),
    [
        (Linear(), "linear", (1e-4, 0.02)),
        (ScaledLinear(), "scaled_linear", (0.00085, 0.012)),
        (Cosine(), "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_tables_agree_with_diffusers(ours, name, betas):
    theirs = diffusers.DDPMScheduler(1000, *betas, beta_schedule=name)
    # Theirs accumulates 1000 float32 factors; each is right to 6e-8, their product to about 1000 times that.
    assert torch.allclose((ours.alpha**2).float(), theirs.alphas_cumprod, rtol=6e-5)
    x0, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0, 10, 500, 999])
    assert torch.allclose(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), atol=1e-5)


def test_add_noise_has_the_marginal_of_q():
    schedule, count = Linear(), 200_000
    t = torch.tensor([0, 300, 999]).repeat_interleave(count)
    x_t = schedule.add_noise(torch.full((len(t), 1), 2.0), torch.randn(len(t), 1), t).view(3, count)
    alpha, sigma = schedule.alpha[[0, 300, 999]].float(), schedule.sigma[[0, 300, 999]].float()
    assert ((x_t.mean(1) - 2 * alpha).abs() < 5 * sigma / count**0.5).all()
    assert ((x_t.var(1) / sigma**2 - 1).abs() < 5 * (2 / count) ** 0.5).all()


def test_lookup_is_float32_and_the_result_keeps_the_dtype():
    schedule = Linear()
    x0, t = torch.randn(3, 2, 4, 4, dtype=torch.bfloat16), torch.tensor([0, 5, 999])
    alpha, sigma = schedule.at(t, x0)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == torch.float32
    assert torch.equal(alpha.flatten(), schedule.alpha[t].float())
    assert torch.equal(sigma.flatten(), schedule.sigma[t].float())
    assert schedule.add_noise(x0, torch.randn_like(x0), t).dtype == torch.bfloat16


def test_no_model_can_cast_or_save_the_tables():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = Linear()

    owner = Owner().half()
    owner.schedule.at(torch.tensor([0]), torch.zeros(1, 1))
    assert owner.schedule.alpha.dtype == torch.float64 and not owner.state_dict()
    assert torch.equal(copy.deepcopy(owner).schedule.alpha, owner.schedule.alpha)


def test_shapes_that_do_not_match_are_refused():
    x0, t = torch.zeros(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"noise of shape \(2, 3\), got \(2, 1\)"):
        Linear().add_noise(x0, torch.zeros(2, 1), t)
    with pytest.raises(ValueError, match=r"t of shape \(2,\), got \(1,\)"):
        Linear().add_noise(x0, x0, t[:1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before(schedule):
    moved = ZeroTerminalSNR(schedule)
    assert (moved.alpha[-1].item(), moved.sigma[-1].item()) == (0.0, 1.0)
    assert moved.alpha[0].item() == pytest.approx(schedule.alpha[0].item(), rel=1e-14)
    x0, noise, last = torch.randn(1, 3), torch.randn(1, 3), torch.tensor([moved.num_steps - 1])
    assert torch.equal(moved.add_noise(x0, noise, last), noise)


@pytest.mark.parametrize(("ours", "name"), [(Linear(), "linear"), (ScaledLinear(), "scaled_linear")])
def test_zero_terminal_snr_agrees_with_diffusers(ours, name):
    betas = (1e-4, 0.02) if name == "linear" else (0.00085, 0.012)
    theirs = diffusers.DDIMScheduler(1000, *betas, beta_schedule=name, rescale_betas_zero_snr=True)
    expected = theirs.alphas_cumprod.double().sqrt()
    # their way through float32 betas loses what little is left at the end
    assert torch.allclose(ZeroTerminalSNR(ours).alpha, expected, rtol=1e-4, atol=3e-4)


def test_zero_terminal_snr_is_for_schedules_that_preserve_variance():
    with pytest.raises(ValueError, match=r"schedule\.schedule: .* got RectifiedFlow with 1000"):
        ZeroTerminalSNR(RectifiedFlow())


def test_rectified_flow_is_a_straight_line_from_data_to_noise():
    schedule, x0, noise = RectifiedFlow(10), torch.randn(1, 3), torch.randn(1, 3)
    x = torch.cat([schedule.add_noise(x0, noise, torch.tensor([t])) for t in range(10)])
    assert torch.allclose(x.diff(dim=0), ((noise - x0) / 10).expand(9, -1), atol=1e-6)
    assert torch.equal(x[-1:], noise)


def test_the_shift_of_rectified_flow_multiplies_the_noise_level():
    """Esser et al. 2024, Eq. 23: sigma / (1 - sigma) times the shift."""
    plain, shifted = RectifiedFlow(), RectifiedFlow(shift=3.0)
    assert torch.allclose(shifted.noise_level[:-1], 3 * plain.noise_level[:-1], rtol=1e-9)


def test_whatever_the_shift_rectified_flow_ends_in_pure_noise():
    for num_steps in (1, 7, 1000):
        for shift in torch.arange(1, 1000).div(100).tolist():
            schedule = RectifiedFlow(num_steps, shift)
            assert (schedule.alpha[-1].item(), schedule.sigma[-1].item()) == (0.0, 1.0)


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()])
def test_between_timesteps_nothing_is_nan_at_the_end_without_signal(schedule):
    t = torch.tensor([0.0, 997.5, 998.0, 998.5, 999.0])
    alpha, sigma = (part.flatten() for part in schedule.at(t, torch.zeros(5, 1)))
    assert (alpha.diff() < 0).all() and (sigma.diff() > -1e-6).all()
    assert alpha[2].item() == pytest.approx(schedule.alpha[998].item(), rel=1e-5)
    assert (alpha[4].item(), sigma[4].item()) == (pytest.approx(0, abs=1e-7), pytest.approx(1, abs=1e-6))


@pytest.mark.parametrize("schedule", [ScaledLinear(), RectifiedFlow()])
def test_levels_are_what_is_looked_up_but_in_float64(schedule):
    for t in (torch.tensor([0, 400, 999]), torch.tensor([0.25, 399.5, 997.75])):
        for exact, found in zip(schedule.levels(t), schedule.at(t, torch.zeros(3, 1)), strict=True):
            assert exact.dtype == torch.float64
            assert torch.allclose(found.flatten().double(), exact, rtol=1e-5)


@pytest.mark.parametrize("schedule", [ScaledLinear(), Cosine(), RectifiedFlow(shift=3.0)])
def test_between_timesteps_the_log_of_the_noise_level_is_linear(schedule):
    like, t = torch.zeros(3, 1), torch.tensor([0, 400, 997])
    for time in (t, t.float()):
        alpha, sigma = schedule.at(time, like)
        assert torch.allclose(alpha.flatten(), schedule.alpha[t].float(), rtol=1e-5)
        assert torch.allclose(sigma.flatten(), schedule.sigma[t].float(), rtol=1e-5)
    alpha, sigma = (part.flatten().double() for part in schedule.at(t + 0.25, like))
    expected = schedule.noise_level[t] ** 0.75 * schedule.noise_level[t + 1] ** 0.25
    assert torch.allclose(sigma / alpha, expected, rtol=1e-5)
    total = alpha + sigma if isinstance(schedule, RectifiedFlow) else alpha**2 + sigma**2
    assert torch.allclose(total, torch.ones(3).double(), atol=1e-6)


@pytest.mark.parametrize("schedule", [ScaledLinear(), Cosine(), VarianceExploding(), RectifiedFlow()])
def test_a_level_is_found_where_it_lies(schedule):
    t = torch.tensor([0.0, 0.25, 400.0, 700.125, 997.5, 998.0]).double()
    alpha, sigma = schedule.levels(t)
    assert torch.allclose(schedule.timesteps(sigma / alpha), t, atol=1e-6)
    beyond = torch.tensor([0.0, 1e-12, 1e12, math.inf]).double()
    assert schedule.timesteps(beyond).tolist() == [0, 0, 999, 999]
    assert Linear(1, 0.5, 0.5).timesteps(beyond).tolist() == [0, 0, 0, 0]


def test_where_variance_explodes_all_of_x0_stays_and_the_log_of_sigma_is_linear():
    schedule = VarianceExploding(1000, 0.002, 80.0)
    assert torch.equal(schedule.alpha, torch.ones(1000).double())
    assert schedule.sigma[[0, -1]].tolist() == pytest.approx([0.002, 80.0], rel=1e-12)
    t = torch.tensor([0.0, 100.5, 499.5, 998.999])
    for found in (schedule.levels(t), schedule.at(t, torch.zeros(4, 1))):
        alpha, sigma = (part.flatten().double() for part in found)
        assert torch.equal(alpha, torch.ones(4).double())
        assert torch.allclose(sigma, 0.002 * 40_000 ** (t.double() / 999), rtol=1e-5)
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    x_t = schedule.add_noise(x0, noise, torch.tensor([0, 999]))
    assert torch.allclose(x_t, x0 + torch.tensor([[0.002], [80.0]]) * noise)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VarianceExploding(1),
        lambda: VarianceExploding(sigma_min=0.0),
        lambda: VarianceExploding(sigma_min=2.0, sigma_max=1.0),
        lambda: Schedule(torch.ones(2), torch.tensor([0.5, 0.5])),
        lambda: Schedule(torch.tensor([0.5, 0.9]), torch.tensor([0.1, 0.9])),
        lambda: RectifiedFlow(num_steps=0),
        lambda: ZeroTerminalSNR(Schedule(torch.ones(3), torch.zeros(3))),
        lambda: Linear(num_steps=0),
        lambda: Linear(beta_end=1.5),
        lambda: Linear(beta_start=0.0),
        lambda: ScaledLinear(beta_start=-0.1),
        lambda: Cosine(num_steps=0),
        lambda: Schedule(torch.tensor([]), torch.tensor([])),
        lambda: Schedule(torch.tensor([0.9, 0.5]), torch.tensor([0.5])),
        lambda: Schedule(torch.tensor([1.1, 0.5]), torch.tensor([0.1, 0.5])),
        lambda: Schedule(torch.tensor([math.nan]), torch.tensor([0.5])),
        lambda: of_betas(torch.tensor([0.1, 0.0])),
    ],
)
def test_impossible_betas_are_refused(make):
    with pytest.raises(ValueError, match="schedule: expected"):
        make()
