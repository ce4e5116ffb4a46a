"""The objective of improved DDPM, whose network also learns the variance of each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.timesteps import TimestepDistribution
from ldm.diffusion.weighting import Weighting
from ldm.types import Denoise


class LearnedVariance(Objective):
    """L_simple and the variational bound: Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 16.

    The network's second C channels are v, from -1 to 1: ln of the variance of p(x_{t-1} | x_t) lies as far
    between ln beta-tilde_t and ln beta_t (Eq. 15, whose v is this one's (v + 1) / 2). The bound trains v
    alone: its gradient stops at the mean. t = 0 is the decoder, N(x0; x0_hat, variance), continuous here.

    The ``DDPM`` sampler uses the variance; others leave it.

    Args:
        schedule: How much noise each timestep holds; that of latent diffusion unless given.
        prediction: What the first C channels mean; the noise unless given.
        weighting: How much each timestep's squared error counts; all the same unless given.
        timesteps: How often each timestep is visited, whole ones; all equally unless given.
        offset_noise: As in ``Objective``.
        bound: lambda, the weight of the bound in bits per dimension.
    """

    outputs = 2

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        timesteps: TimestepDistribution | None = None,
        offset_noise: float = 0.0,
        bound: float = 0.001,
    ) -> None:
        super().__init__(schedule, prediction, weighting, timesteps, offset_noise)
        if self.schedule.num_steps < 2:
            raise ValueError(
                "objective.schedule: LearnedVariance needs at least 2 timesteps, got "
                f"{self.schedule.num_steps}"
            )
        self.bound = bound
        self._tables = _posteriors(self.schedule)

    def loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Add the bound to the weighted squared error: (B,) float32."""
        if t.is_floating_point():
            raise ValueError(
                "objective.timesteps: LearnedVariance needs whole timesteps, but "
                f"{type(self.timesteps).__name__} draws fractional ones"
            )
        x0, noise = x0.float(), noise.float()
        alpha, sigma = self.schedule.at(t, x0)
        x_t = self.schedule.add_noise(x0, noise, t)
        output, v = self._output(model, x_t, t, alpha, sigma).chunk(2, dim=1)
        x0_hat = self.prediction.x0(output.detach(), x_t, alpha, sigma)
        error = output - self.prediction.target(x0, noise, alpha, sigma)
        bound = self.bound * self.schedule.num_steps
        return self._weighted(error, t) + bound * self.bits(x0, x0_hat, v, t)

    def bits(self, x0: Tensor, x0_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Return the term L_t of the bound, in bits per dimension: Nichol & Dhariwal 2021, Eq. 4 to 6.

        Args:
            x0: (B, C, h, w).
            x0_hat: Its estimate.
            v: What the network says of the variance, same shape.
            t: (B,) int64.

        Returns:
            (B,): the KL divergence of two normal distributions; at t = 0 minus the log-likelihood.
        """
        rows = self._tables.to(v.device)[:, t.to(v.device)].to(v.dtype)
        lower, upper, from_x0 = (row.view(-1, 1, 1, 1) for row in rows)
        log_var = torch.lerp(lower, upper, (v + 1) / 2)
        error = from_x0 * (x0 - x0_hat)
        divergence = log_var - lower - 1 + (lower.exp() + error.square()) * (-log_var).exp()
        likelihood = math.log(2 * math.pi) + log_var + error.square() * (-log_var).exp()
        is_decoder = (t == 0).to(v.device).view(-1, 1, 1, 1)
        return torch.where(is_decoder, likelihood, divergence).flatten(1).mean(1) / (2 * math.log(2))

    def denoiser(self, model: Network) -> Denoise:
        """Turn the raw network into an estimate of x0; what it says of the variance is left."""
        estimate = self.variance_denoiser(model)
        return lambda x_t, t: estimate(x_t, t)[:, : x_t.shape[1]]

    def variance_denoiser(self, model: Network) -> Denoise:
        """Turn the raw network into an estimate of x0 with v behind it, (B, 2 C, h, w)."""

        def estimate(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.schedule.at(t, x_t)
            output, v = self._output(model, x_t, t, alpha, sigma).chunk(2, dim=1)
            return torch.cat([self.prediction.x0(output, x_t, alpha, sigma), v], dim=1)

        return estimate


def _posteriors(schedule: Schedule) -> Tensor:
    """Tabulate ln beta-tilde, ln beta and the factor on x0 in the mean of q(x_{t-1} | x_t, x0).

    (3, T) float64. beta-tilde is 0 at t = 0; there that of t = 1 stands for it, as in the paper's code.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    before, noise_before = (
        torch.cat([alpha.new_ones(1), alpha[:-1]]),
        torch.cat([sigma.new_zeros(1), sigma[:-1]]),
    )
    beta = sigma.square() - (alpha / before * noise_before).square()
    tilde = beta * (noise_before / sigma).square()
    tilde[0] = tilde[1]
    return torch.stack([tilde.log(), beta.log(), before * beta / sigma.square()])
