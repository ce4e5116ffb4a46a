"""Variance-preserving noise schedules: how much of x0 is left at each timestep.

Letters: alpha_t = sqrt(abar_t) scales the data and sigma_t = sqrt(1 - abar_t) the noise, where
abar_t = prod_{s <= t} (1 - beta_s) as in Ho et al. 2020 (arXiv:2006.11239). Timesteps count from
0 (almost clean) to T - 1 (almost noise): index t is the paper's t + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Schedule:
    """Tables of alpha_t and sigma_t with alpha_t**2 + sigma_t**2 = 1.

    No ``nn.Module``: a model's ``half()`` must not round the tables, nor its ``state_dict`` carry them.

    Args:
        beta: Variance of the noise that each step adds, (T,) float64 in (0, 1], first step first.

    Raises:
        ValueError: If ``beta`` is empty or leaves (0, 1].
    """

    alpha: Tensor
    """(T,) float64 on the CPU, falling: sqrt(abar_t)."""
    sigma: Tensor
    """(T,) float64 on the CPU, rising: sqrt(1 - abar_t)."""

    def __init__(self, beta: Tensor) -> None:
        beta = beta.double()
        if len(beta) == 0 or not bool(((beta > 0) & (beta <= 1)).all()):
            raise ValueError(f"schedule: expected num_steps >= 1 and every beta in (0, 1], got {_span(beta)}")
        abar = torch.cumprod(1 - beta, dim=0)
        self.alpha, self.sigma = abar.sqrt(), (1 - abar).sqrt()
        self._on_device: dict[torch.device, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    @property
    def log_snr(self) -> Tensor:
        """(T,) float64, falling: ln(alpha_t**2 / sigma_t**2); -inf where nothing of x0 is left."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha_t and sigma_t, shaped to multiply ``like``.

        Args:
            t: (B,) int64 in [0, num_steps).
            like: (B, ...), only rank and device matter.

        Returns:
            alpha_t and sigma_t, each (B, 1, ..., 1) float32 on the device of ``like``.
        """
        if like.device not in self._on_device:
            self._on_device[like.device] = torch.stack([self.alpha, self.sigma]).float().to(like.device)
        alpha, sigma = self._on_device[like.device][:, t.to(like.device)].view(2, -1, *[1] * (like.ndim - 1))
        return alpha, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) in closed form: x_t = alpha_t x_0 + sigma_t noise.

        Ho et al. 2020 (arXiv:2006.11239), Eq. 4, written with alpha_t = sqrt(abar_t)
        and sigma_t = sqrt(1 - abar_t), so that alpha_t**2 + sigma_t**2 = 1.

        Args:
            x0: Clean latents, (B, C, h, w), standard deviation close to 1.
            noise: Standard normal, same shape, dtype and device as ``x0``.
            t: (B,) int64 in [0, num_steps); 0 is almost clean, num_steps - 1 almost noise.

        Returns:
            (B, C, h, w) in the dtype of ``x0``; coefficients are looked up in float32.

        Raises:
            ValueError: If ``noise`` or ``t`` does not match ``x0`` in shape. Values of
                ``t`` are not checked: that would synchronise the GPU on every step.
        """
        if noise.shape != x0.shape:
            raise ValueError(
                f"add_noise: expected noise of shape {tuple(x0.shape)}, got {tuple(noise.shape)}"
            )
        if t.shape != x0.shape[:1]:
            raise ValueError(f"add_noise: expected t of shape {tuple(x0.shape[:1])}, got {tuple(t.shape)}")
        alpha, sigma = self.at(t, x0)
        return (alpha * x0 + sigma * noise).to(x0.dtype)


class Linear(Schedule):
    """Beta grows linearly: Ho et al. 2020 (arXiv:2006.11239), Section 4.

    Args:
        num_steps: T, number of timesteps. With fewer than 1000, larger betas keep the end as noisy.
        beta_start: Noise variance of the first step, in (0, 1).
        beta_end: Noise variance of the last step, in (0, 1).
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        super().__init__(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


class ScaledLinear(Schedule):
    """sqrt(beta) grows linearly: the schedule of latent diffusion, Rombach et al. 2021 (arXiv:2112.10752).

    Args:
        num_steps: T, number of timesteps.
        beta_start: Noise variance of the first step, in (0, 1).
        beta_end: Noise variance of the last step, in (0, 1).
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        if beta_start < 0 or beta_end < 0:
            raise ValueError(f"schedule: expected betas in (0, 1), got {beta_start} and {beta_end}")
        root = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64)
        super().__init__(root.square())


class Cosine(Schedule):
    """abar follows a squared cosine: Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17.

    abar_t = f(t) / f(0) with f(t) = cos((t / T + s) / (1 + s) * pi / 2)**2. The betas that follow,
    1 - abar_t / abar_{t-1}, are cut at ``max_beta``, because the last one would be 1.

    Args:
        num_steps: T, number of timesteps.
        offset: s, keeps the first betas from vanishing.
        max_beta: Largest noise variance of a step, in (0, 1]. With 1 nothing of x0 is left at T - 1,
            which epsilon prediction cannot undo.
    """

    def __init__(self, num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> None:
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        abar = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
        super().__init__((1 - abar[1:] / abar[:-1]).clamp(max=max_beta))


def _span(beta: Tensor) -> str:
    return f"{len(beta)} betas" + (f" from {beta.min():.3g} to {beta.max():.3g}" if len(beta) else "")
