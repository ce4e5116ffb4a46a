"""Losses of the stages, per sample until the last line."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum the squared errors of each sample: L_recon = sum_i ||x_i - x_hat_i||^2.

    Args:
        output: (B, ...).
        target: Same shape.

    Returns:
        (B,) float32.
    """
    return (output.float() - target.float()).square().flatten(1).sum(1)


def kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = sum (mu^2 + sigma^2 - 1 - ln sigma^2) / 2, in nats.

    Kingma & Welling 2013 (arXiv:1312.6114), app. B.

    Args:
        mean: mu, (B, ...).
        log_var: ln sigma^2, same shape.

    Returns:
        (B,) float32, 0 where the posterior is the prior.
    """
    mean, log_var = mean.float(), log_var.float()
    return 0.5 * (mean.square() + log_var.exp() - 1.0 - log_var).flatten(1).sum(1)


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each sample, in dB, for a range of 2 ([-1, 1]).

    Args:
        output: (B, 3, H, W), clamped to [-1, 1] here.
        target: (B, 3, H, W) in [-1, 1].

    Returns:
        (B,) float32, or float64 like ``output``.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    error = (output.to(dtype).clamp(-1.0, 1.0) - target.to(dtype)).square().flatten(1).mean(1)
    return 10.0 * (4.0 / error.clamp_min(1e-12)).log10()
