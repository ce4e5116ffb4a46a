"""MeanFlow: a network that learns the average velocity between two times, for one step or a few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.diffusion.objective import Network, Objective
from ldm.diffusion.prediction import Flow
from ldm.diffusion.schedule import RectifiedFlow
from ldm.diffusion.timesteps import LogitNormal, TimestepDistribution
from ldm.rng import SampleNoise
from ldm.types import Denoise


class MeanFlow(Objective):
    """MeanFlow: Geng et al. 2025 (arXiv:2505.13447), in the improved form of arXiv:2512.02012.

    On the line z_t = (1 - t) x0 + t eps the average velocity u over [r, t] and the velocity v satisfy
    u = v - (t - r) du/dt, the MeanFlow identity. So V = u + (t - r) du/dt, whose derivative along the flow is
    held fixed, is regressed onto eps - x0. The derivative moves z by the network's own velocity u at r = t
    (improved), or by eps - x0.

    The derivative is computed without a graph, and u with one in a pass of its own, so that blocks may be
    compiled, recomputed or sharded as with any objective.

    The network gets two times: t less 1 / T, and t - r. It is sampled by ``MeanFlowSampler``; other samplers
    use its velocity. Validation has the error of the velocity.

    Args:
        num_steps: T timesteps; times are continuous, t = (timestep + 1) / T.
        timesteps: Distribution of both times: the larger is t. ``LogitNormal(-0.4, 1)`` unless given.
        ratio: Share of the samples with r < t; the others train the velocity.
        improved: Use the network's own velocity in the derivative, which costs another forward pass.
        power: p of the adaptive weight 1 / (||error||**2 + 0.001)**p, here over the number of entries; 0 is
            the squared error. With 1 the loss in training is 1 and says nothing: look at the validation's.
        time_scale: What the network gets for a time of 1. Networks embed times by waves of up to 1 radian per
            unit, whose derivative this is a factor of: with T, as other objectives have, it drowns u (Lu &
            Song 2024, arXiv:2410.11081, sec. 4.1).
    """

    times = 2

    def __init__(
        self,
        num_steps: int = 1000,
        timesteps: TimestepDistribution | None = None,
        ratio: float = 0.25,
        improved: bool = True,
        power: float = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"objective.ratio must be in (0, 1], got {ratio}")
        if time_scale <= 0:
            raise ValueError(f"objective.time_scale must be > 0, got {time_scale}")
        super().__init__(RectifiedFlow(num_steps), Flow(), timesteps=timesteps or LogitNormal(-0.4, 1.0))
        self.ratio, self.improved, self.power, self.time_scale = ratio, improved, power, time_scale

    def draw(
        self, x0: Tensor, noise: SampleNoise | None = None, position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw two times and noise for each sample.

        Returns:
            (B, 2) float32, the timesteps of t and r, where r = t outside of training; and noise like ``x0``.
        """
        t, eps = super().draw(x0, noise, position)
        t = t.float()
        if position is None:
            return torch.stack([t, t], 1), eps
        uniform = torch.rand(2, len(x0)) if noise is None else torch.stack([noise.uniform(), noise.uniform()])
        other = self.timesteps.quantile(uniform[0].double(), self.schedule).float().to(t.device)
        other = torch.where((uniform[1] < self.ratio).to(t.device), other, t)
        return torch.stack([torch.maximum(t, other), torch.minimum(t, other)], 1), eps

    def training_loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the error of V, adaptively weighted, of each sample: (B,) float32."""
        x0, noise = x0.float(), noise.float()
        z, velocity = self._at(x0, noise, t), noise - x0
        times = torch.stack([t[:, 0], t[:, 0] - t[:, 1]], 1)
        slope = self._slope(model, z, times, velocity)
        interval = (t[:, 0] - t[:, 1]).view(-1, 1, 1, 1) / self.schedule.num_steps
        error = (self._u(model, z, times) + interval * slope - velocity).square().flatten(1)
        weight: Tensor = ((error.detach().sum(1) + 1e-3) / error.shape[1]) ** -self.power
        return weight * error.mean(1)

    def loss(self, model: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of the velocity, u at r = t, of each sample: (B,) float32."""
        x0, noise = x0.float(), noise.float()
        u = self._u(model, self._at(x0, noise, t), _now(t))
        return (u - (noise - x0)).square().flatten(1).mean(1)

    def denoiser(self, model: Network) -> Denoise:
        """Turn the raw network into an estimate of x0.

        Returns:
            (x_t, t) -> x_t - sigma u: with t (B, 2), the timesteps of t and r, u is the average velocity
            between; with t (B,) it is the velocity.
        """

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            first = t if t.ndim == 1 else t[:, 0]
            times = _now(t) if t.ndim == 1 else torch.stack([t[:, 0], t[:, 0] - t[:, 1]], 1)
            return x_t - self._sigma(first) * self._u(model, x_t, times.float())

        return denoise

    def _sigma(self, t: Tensor) -> Tensor:
        return ((t.float() + 1) / self.schedule.num_steps).view(-1, 1, 1, 1)

    def _at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma = self._sigma(t[:, 0])
        return (1 - sigma) * x0 + sigma * noise

    def _u(self, model: Network, z: Tensor, times: Tensor) -> Tensor:
        """Run the network at the timesteps of t and those between r and t, (B, 2)."""
        return model(z, times * (self.time_scale / self.schedule.num_steps)).float()

    @torch.no_grad()
    def _slope(self, model: Network, z: Tensor, times: Tensor, velocity: Tensor) -> Tensor:
        """Return du/dt along the flow, where r stays."""
        along = self._u(model, z, _now(times)) if self.improved else velocity
        speed = torch.full_like(times, self.schedule.num_steps)  # of both in timesteps, per unit of t
        with sdpa_kernel(SDPBackend.MATH):  # the only kernel of attention with a forward derivative
            slope: Tensor = jvp(lambda z, times: self._u(model, z, times), (z, times), (along, speed))[1]
        return slope


def _now(t: Tensor) -> Tensor:
    """Return the times of a velocity: (B, 2) float32, no interval."""
    first = (t if t.ndim == 1 else t[:, 0]).float()
    return torch.stack([first, torch.zeros_like(first)], 1)
