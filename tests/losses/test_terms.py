import math

import torch
from torch.distributions import Independent, Normal, kl_divergence

from ldm.losses.kl import kl_to_standard_normal
from ldm.losses.l2 import squared_error
from ldm.metrics.psnr import psnr


def test_kl_is_that_of_torch_distributions():
    mean, log_var = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 3)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    assert torch.allclose(kl_to_standard_normal(mean, log_var), kl_divergence(q, p), rtol=1e-5)


def test_kl_is_zero_only_at_the_prior():
    zeros = torch.zeros(1, 2, 3, 3)
    assert kl_to_standard_normal(zeros, zeros).item() == 0.0
    assert kl_to_standard_normal(zeros + 0.1, zeros).item() > 0.0
    assert kl_to_standard_normal(zeros, zeros + 0.1).item() > 0.0


def test_squared_error_sums_and_psnr_knows_its_range():
    target = torch.zeros(2, 3, 4, 4)
    output = target + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    assert torch.allclose(squared_error(output, target), torch.tensor([0.48, 1.92]), rtol=1e-5)
    expected = torch.tensor([20 * math.log10(2 / 0.1), 20 * math.log10(2 / 0.2)])
    assert torch.allclose(psnr(output, target), expected, atol=1e-4)


def test_losses_are_float32_under_bfloat16():
    small = torch.full((1, 3, 64, 64), 0.01, dtype=torch.bfloat16)
    assert squared_error(small, torch.zeros_like(small)).dtype == torch.float32
    assert kl_to_standard_normal(small, small).dtype == torch.float32
