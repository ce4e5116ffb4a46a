"""The training objective: add noise to a sample, run the network, weight the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ldm.diffusion.prediction import Epsilon, Prediction
from ldm.diffusion.schedule import ScaledLinear, Schedule
from ldm.diffusion.timesteps import TimestepDistribution, UniformTimesteps
from ldm.diffusion.weighting import Uniform, Weighting
from ldm.io.config import Configurable
from ldm.rng import SampleNoise
from ldm.types import Denoise, send

Network = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, C, h, w), t (B,)) -> raw output (B, C, h, w)``: a ``Denoiser`` whose condition is given."""


class Objective(Configurable):
    """Regress a prediction's target at random timesteps: Ho et al. 2020 (arXiv:2006.11239), Algorithm 1.

    Args:
        schedule: How much noise each timestep holds; that of latent diffusion unless given.
        prediction: What the network's output means; the noise unless given.
        weighting: How much each timestep counts; all the same unless given.
        timesteps: How often each timestep is visited; all equally unless given.
        offset_noise: Standard deviation of noise that is constant over each channel, added to the rest
            (Guttenberg 2023, "Diffusion with offset noise"), so that brightness is learned; 0 adds none,
            0.1 is usual.

    Raises:
        ValueError: If the schedule ends in pure noise, from which ``Epsilon`` and ``EDM`` cannot recover x0.
    """

    outputs: ClassVar[int] = 1
    """Channels of the network's output, over C."""
    times: ClassVar[int] = 1
    """Times that the network gets, see ``DenoiserDims.times``."""

    def __init__(
        self,
        schedule: Schedule | None = None,
        prediction: Prediction | None = None,
        weighting: Weighting | None = None,
        timesteps: TimestepDistribution | None = None,
        offset_noise: float = 0.0,
    ) -> None:
        self.schedule = schedule or ScaledLinear()
        self.prediction = prediction or Epsilon()
        self.weighting = weighting or Uniform()
        self.timesteps = timesteps or UniformTimesteps()
        self.offset_noise = offset_noise
        if self.prediction.needs_signal and self.schedule.alpha[-1] == 0:
            raise ValueError(
                f"objective.prediction: got {type(self.prediction).__name__} on "
                f"{type(self.schedule).__name__}, whose last timestep is pure noise, from which x0 cannot "
                "be recovered: expected Velocity, Flow or X0"
            )
        self._weights: dict[torch.device, Tensor] = {}

    def draw(
        self, x0: Tensor, noise: SampleNoise | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a timestep and noise for each sample: Algorithm 1, lines 3 and 4.

        Args:
            x0: (B, C, h, w).
            noise: Per-sample streams that t and noise shall come from; torch's global ones unless given.
            position: (B,) int64, positions of the samples in the global training stream; None
                outside of training, where timesteps are uniform, so that losses compare between
                distributions.

        Returns:
            t, (B,) in [0, T - 1], int64 or, from continuous ``timesteps``, float32; and noise like ``x0``:
            standard normal, and offset noise.
        """
        # in float64, which not every device has, u < 1 cannot round up to T
        uniform = (torch.rand(len(x0)) if noise is None else noise.uniform()).double()
        timesteps = UniformTimesteps() if position is None else self.timesteps
        t = timesteps.quantile(timesteps.even(uniform, position), self.schedule)
        t = send(t.float() if t.is_floating_point() else t, x0.device)
        like = torch.randn_like if noise is None else noise.like
        eps = like(x0)
        if self.offset_noise:
            eps = eps + self.offset_noise * like(x0[..., :1, :1])
        return t, eps

    def loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the weighted mean squared error of each sample: Algorithm 1, line 5.

        Args:
            model: The raw network with its condition, a ``Denoiser`` but for that.
            x0: Clean samples, (B, C, h, w).
            noise: Standard normal, same shape.
            t: (B,) in [0, T - 1], int64 or floating.

        Returns:
            (B,) float32, the mean over (C, h, w) times the weight at t.
        """
        output, target = self._regressed(model, x0, noise, t)
        return self._weighted(output - target, t)

    def training_loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what training minimises: ``loss``, unless that is no measure of a single sample."""
        return self.loss(model, x0, noise, t)

    def weight(self, t: Tensor) -> Tensor:
        """Look up how much the squared error of the raw output counts.

        Args:
            t: (B,) in [0, T - 1], int64, or floating: between two timesteps the weight is linear.

        Returns:
            (B,) float32.
        """
        if t.device not in self._weights:
            self._weights[t.device] = self.weighting(self.schedule, self.prediction).float().to(t.device)
        table = self._weights[t.device]
        if not t.is_floating_point():
            return table[t]
        below = t.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], (t - below).to(table.dtype))

    def denoiser(self, model: Network) -> Denoise:
        """Turn the raw network into an estimate of x0.

        Args:
            model: The raw network with its condition, a ``Denoiser`` but for that.

        Returns:
            (x_t, t) -> x0_hat in float32.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = self.schedule.at(t, x_t)
            return self.prediction.x0(self._output(model, x_t, t, alpha, sigma), x_t, alpha, sigma)

        return denoise

    def variance_denoiser(self, model: Network) -> Denoise:
        """Turn the raw network into what samplers that use a learned variance get; here x0_hat alone."""
        return self.denoiser(model)

    def _regressed(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw output at x_t and its target, float32."""
        x0, noise = x0.float(), noise.float()
        alpha, sigma = self.schedule.at(t, x0)
        output = self._output(model, self.schedule.add_noise(x0, noise, t), t, alpha, sigma)
        return output, self.prediction.target(x0, noise, alpha, sigma)

    def _weighted(self, error: Tensor, t: Tensor) -> Tensor:
        """Weigh the squared error of the raw output of each sample, (B,)."""
        return self.weight(t.to(error.device)) * error.square().flatten(1).mean(1)

    def _output(self, model: Network, x_t: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Run the network on the input and time of the prediction; float32 in any precision."""
        time = self.prediction.time(t, alpha, sigma)
        return model(self.prediction.input(x_t, alpha, sigma), time).float()
