import math

import pytest
import torch

from ldm.diffusion.prediction import EDM, X0, Epsilon, Flow, Velocity
from ldm.diffusion.schedule import Linear, RectifiedFlow, ScaledLinear, Schedule, ZeroTerminalSNR
from ldm.diffusion.weighting import EDMWeighting, MinSNR, Simple, SoftMinSNR, Uniform, VariationalBound

SNR = [math.inf, 10.0, 5.0, 1.0, 0.0]
ENDS = Schedule(torch.tensor([1.0, *(math.sqrt(s / (1 + s)) for s in SNR[1:4]), 0.0]),
                torch.tensor([0.0, *(math.sqrt(1 / (1 + s)) for s in SNR[1:4]), 1.0]))  # fmt: skip
PREDICTIONS = [Epsilon(), Velocity(), X0(), Flow(), EDM()]
IN_X0 = [MinSNR(), SoftMinSNR(), Simple(), VariationalBound(), EDMWeighting()]


def flow(snr):
    return (1 + math.sqrt(snr)) ** 2


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [
        # Hang et al. 2023, Section 3.4: min(1, g / SNR), min(SNR, g) / (SNR + 1) and min(SNR, g)
        (MinSNR(5.0), Epsilon(), [0, 1 / 2, 1, 1, 1]),
        (MinSNR(5.0), Velocity(), [0, 5 / 11, 5 / 6, 1 / 2, 0]),
        (MinSNR(5.0), X0(), [5, 5, 5, 1, 0]),
        (MinSNR(5.0), Flow(), [0, 5 / flow(10), 5 / flow(5), 1 / 4, 0]),
        (SoftMinSNR(4.0), Epsilon(), [0, 4 / 14, 4 / 9, 4 / 5, 1]),
        (SoftMinSNR(4.0), Velocity(), [0, 40 / 14 / 11, 20 / 9 / 6, 4 / 5 / 2, 0]),
        (SoftMinSNR(4.0), X0(), [4, 40 / 14, 20 / 9, 4 / 5, 0]),
        (SoftMinSNR(4.0), Flow(), [0, 40 / 14 / flow(10), 20 / 9 / flow(5), 4 / 5 / 4, 0]),
        # Karras et al. 2022, Table 1: SNR + 1 / sigma_data**2 on x0_hat, 1 on the output of EDM
        (EDMWeighting(1.0), Velocity(), [1, 1, 1, 1, 1]),
        (EDMWeighting(0.5), Epsilon(), [1, 1.4, 1.8, 5, 4e16]),
        (EDMWeighting(0.5), EDM(0.5), [1, 1, 1, 1, 1]),
        (EDMWeighting(0.5), EDM(1.0), [1, 14 / 11, 9 / 6, 5 / 2, 4]),
        (Simple(), Epsilon(), [1, 1, 1, 1, 1]),
        (Simple(), Velocity(), [1, 10 / 11, 5 / 6, 1 / 2, 0]),
        (Simple(), Flow(), [1, 10 / flow(10), 5 / flow(5), 1 / 4, 0]),
    ],
)
def test_golden_values_from_infinite_to_no_signal(weighting, prediction, expected):
    found = weighting(ENDS, prediction)
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", [*IN_X0, Uniform()])
def test_every_weight_is_finite_at_both_ends(weighting, prediction):
    assert weighting(ENDS, prediction).isfinite().all() and (weighting(ENDS, prediction) >= 0).all()


@pytest.mark.parametrize("schedule", [Linear(), ZeroTerminalSNR(ScaledLinear()), RectifiedFlow()])
@pytest.mark.parametrize("weighting", IN_X0)
def test_the_same_error_weighs_the_same_in_every_space(schedule, weighting):
    alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
    expected = weighting.x0(schedule.alpha, schedule.sigma)[:-1]
    for prediction in PREDICTIONS:
        found = weighting(schedule, prediction)[:-1] * prediction.error_ratio(alpha, sigma)
        assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_is_one_on_the_own_target(prediction):
    assert torch.equal(Uniform()(ENDS, prediction), torch.ones(5).double())


def test_the_bound_is_eq_12_of_ddpm_on_the_noise():
    """beta**2 / (2 beta_tilde (1 - beta) (1 - abar)), and the decoder's 1 / (2 beta) on x0 at the start."""
    schedule = Linear()
    abar = schedule.alpha.square()
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / before
    beta_tilde = beta * (1 - before) / (1 - abar)
    expected = beta.square() / (2 * beta_tilde * (1 - beta) * (1 - abar))
    assert torch.allclose(VariationalBound()(schedule, Epsilon())[1:], expected[1:], rtol=1e-6)
    assert VariationalBound()(schedule, X0())[0] == pytest.approx(1 / (2 * beta[0].item()))


def test_the_bound_sums_to_the_precision_of_the_decoder():
    """The falls of the SNR telescope."""
    schedule = ScaledLinear()
    snr = schedule.noise_level**-2
    total = 2 * VariationalBound()(schedule, X0())[1:].sum()
    assert total.item() == pytest.approx((snr[0] - snr[-1]).item(), rel=1e-9)


@pytest.mark.parametrize("weighting", [MinSNR, SoftMinSNR])
def test_gamma_must_be_positive(weighting):
    with pytest.raises(ValueError, match=r"weighting\.gamma must be > 0, got 0"):
        weighting(gamma=0)


def test_sigma_data_must_be_positive():
    with pytest.raises(ValueError, match=r"weighting\.sigma_data must be > 0, got 0"):
        EDMWeighting(0)
