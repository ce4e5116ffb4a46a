import math

import pytest
import torch

from ldm.diffusion.prediction import Epsilon, Sample, Velocity
from ldm.diffusion.weighting import MinSNR, Uniform

SNR = torch.tensor([0.0, 1.0, 5.0, 10.0, math.inf])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (Epsilon(), [1.0, 1.0, 1.0, 0.5, 0.0]),
        (Velocity(), [0.0, 1 / 2, 5 / 6, 5 / 11, 0.0]),
        (Sample(), [0.0, 1.0, 5.0, 5.0, 5.0]),
    ],
)
def test_min_snr_in_each_space(prediction, expected):
    """Hang et al. 2023, Section 3.4: min(1, g / SNR), min(SNR, g) / (SNR + 1) and min(SNR, g)."""
    assert torch.allclose(MinSNR(gamma=5.0)(SNR, prediction), torch.tensor(expected), atol=1e-9)


def test_min_snr_weighs_the_same_error_the_same_in_each_space():
    snr = torch.tensor([0.01, 1.0, 30.0])
    in_x0 = [MinSNR()(snr, p) * p.error_ratio(snr) for p in (Epsilon(), Velocity(), Sample())]
    assert torch.allclose(in_x0[0], in_x0[1]) and torch.allclose(in_x0[0], in_x0[2])


def test_uniform_is_one_on_the_own_target():
    for prediction in (Epsilon(), Velocity(), Sample()):
        assert torch.equal(Uniform()(SNR, prediction), torch.ones(5))


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match=r"weighting\.gamma must be > 0, got 0"):
        MinSNR(gamma=0)
