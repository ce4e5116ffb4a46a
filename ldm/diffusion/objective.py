"""The training objective: noise a sample, ask the network, weigh the error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.noise import SampleNoise
from ldm.diffusion.prediction import Epsilon, Prediction
from ldm.diffusion.schedule import ScaledLinear, Schedule
from ldm.diffusion.weighting import Uniform, Weighting
from ldm.types import Denoise


class Objective:
    """Regress a prediction's target at random timesteps: Ho et al. 2020 (arXiv:2006.11239), Algorithm 1.

    Args:
        schedule: How much noise each timestep holds; that of latent diffusion unless given.
        prediction: What the network's output means; the noise unless given.
        weighting: How much each timestep counts; all the same unless given.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        self.schedule = schedule or ScaledLinear()
        self.prediction = prediction or Epsilon()
        self.weighting = weighting or Uniform()

    def draw(self, x0: Tensor, noise: SampleNoise | None = None) -> tuple[Tensor, Tensor]:
        """Draw a timestep and noise for each sample: Algorithm 1, lines 3 and 4.

        Args:
            x0: (B, C, h, w).
            noise: Per-sample streams that t and noise shall come from; torch's global ones unless given.

        Returns:
            t, (B,) int64 uniform over {0, ..., T - 1}, and standard normal noise like ``x0``.
        """
        uniform = torch.rand(len(x0)) if noise is None else noise.uniform()
        # In float64, which not every device has, u < 1 cannot round up to T.
        t = (uniform.double() * self.schedule.num_steps).long().to(x0.device)
        return t, torch.randn_like(x0) if noise is None else noise.like(x0)

    def loss(self, model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the weighted mean squared error of each sample: Algorithm 1, line 5.

        Args:
            model: The raw network, (x_t (B, C, h, w), t (B,)) -> (B, C, h, w).
            x0: Clean samples, (B, C, h, w).
            noise: Standard normal, same shape.
            t: (B,) int64 in [0, T).

        Returns:
            (B,) float32, the mean over (C, h, w) times the weight at t.
        """
        x0, noise = x0.float(), noise.float()
        alpha, sigma = self.schedule.at(t, x0)
        output = model(self.schedule.add_noise(x0, noise, t), t).float()
        error = output - self.prediction.target(x0, noise, alpha, sigma)
        snr = (alpha / sigma).square().flatten()
        return self.weighting(snr, self.prediction) * error.square().flatten(1).mean(1)

    def denoiser(self, model: Callable[[Tensor, Tensor], Tensor]) -> Denoise:
        """Turn the raw network into an estimate of x0.

        Args:
            model: (x_t (B, C, h, w), t (B,)) -> (B, C, h, w), what ``prediction`` says.

        Returns:
            (x_t, t) -> x0_hat in float32.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.schedule.at(t, x_t)
            return self.prediction.x0(model(x_t, t).float(), x_t, alpha, sigma)

        return denoise
