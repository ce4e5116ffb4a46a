"""Noise schedules: how much of x0 is left at each timestep, and how much noise is there instead.

Letters: x_t = alpha_t x0 + sigma_t eps. Timesteps count from 0 (almost clean) to T - 1 (almost or only
noise). Variance-preserving schedules have alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), where
abar_t = prod_{s <= t} (1 - beta_s) as in Ho et al. 2020 (arXiv:2006.11239); index t is the paper's t + 1.
sigma_t / alpha_t is the noise level, sigma of Karras et al. 2022 (arXiv:2206.00364); SNR_t = 1 / level**2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.io.config import Configurable


class Schedule(Configurable):
    """Tables of alpha_t and sigma_t.

    No ``nn.Module``: a model's ``half()`` must not round the tables, nor its ``state_dict`` carry them.

    Args:
        alpha: (T,) float64 in [0, 1], falling or constant.
        sigma: (T,) float64 >= 0, rising or constant.

    Raises:
        ValueError: If the tables are empty, differ in length, leave their ranges or do not fall and rise, or
            two timesteps have the same noise level.
    """

    alpha: Tensor
    """(T,) float64 on the CPU, falling or constant."""
    sigma: Tensor
    """(T,) float64 on the CPU, rising or constant."""

    def __init__(self, alpha: Tensor, sigma: Tensor) -> None:
        self.alpha, self.sigma = alpha.double(), sigma.double()
        if not (0 < len(alpha) == len(sigma) and self._is_sound()):
            raise ValueError(
                "schedule: expected num_steps >= 1, alpha falling within [0, 1], sigma rising from 0 or more "
                f"and sigma / alpha rising in each step, got {_span(self.alpha)} and {_span(self.sigma)}"
            )
        self._on_device: dict[torch.device, Tensor] = {}

    def _is_sound(self) -> bool:
        tables = torch.stack([1 - self.alpha, self.sigma])
        falls = bool((tables.diff() >= 0).all()) and bool((self.noise_level.diff() > 0).all())
        return falls and bool((tables >= 0).all()) and bool((self.alpha >= 0).all())

    @property
    def num_steps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    @property
    def noise_level(self) -> Tensor:
        """(T,) float64, rising: sigma_t / alpha_t; infinite where nothing of x0 is left."""
        return self.sigma / self.alpha

    def split(self, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of this kind of schedule at a finite ``noise_level``."""
        alpha = 1 / (1 + noise_level.square()).sqrt()
        return alpha, noise_level * alpha

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t in float64: those of the tables, or between them if ``t`` is floating.

        Args:
            t: (N,) in [0, num_steps - 1], int64 or floating, on the CPU. A floating T - 1 leaves 1e-8 of x0
                where the table leaves nothing.
        """
        if not t.is_floating_point():
            return self.alpha[t], self.sigma[t]
        return self._between(self._log_level(), t)

    def timesteps(self, noise_level: Tensor) -> Tensor:
        """Find the timesteps of noise levels: the inverse of ``levels``.

        Args:
            noise_level: (N,) float64 >= 0; what lies beyond the ends of the schedule is taken to them.

        Returns:
            (N,) float64 in [0, num_steps - 1], between two timesteps where none has that level.
        """
        if self.num_steps == 1:  # nothing to lie between
            return torch.zeros_like(noise_level)
        known, wanted = self._log_level(), noise_level.log()
        above = torch.searchsorted(known, wanted).clamp(1, self.num_steps - 1)
        fraction = (wanted - known[above - 1]) / (known[above] - known[above - 1])
        return (above - 1 + fraction).clamp(0, self.num_steps - 1)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up alpha_t and sigma_t, shaped to multiply ``like``.

        Args:
            t: (B,) in [0, num_steps - 1]: int64, or floating between two timesteps, where the log of the
                noise level is linear.
            like: (B, ...), only rank and device matter.

        Returns:
            alpha_t and sigma_t, each (B, 1, ..., 1) float32 on the device of ``like``.
        """
        if like.device not in self._on_device:
            table = torch.stack([self.alpha, self.sigma, self._log_level()])
            self._on_device[like.device] = table.float().to(like.device)
        alpha, sigma, log_level = self._on_device[like.device]
        t, shape = t.to(like.device), (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self._between(log_level, t) if t.is_floating_point() else (alpha[t], sigma[t])
        return alpha.view(shape), sigma.view(shape)

    def _log_level(self) -> Tensor:
        # finite where nothing of x0 is left, so that the timestep before that one has a neighbour
        return self.noise_level.clamp(1e-8, 1e8).log()

    def _between(self, log_level: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        below = t.floor().long()
        above = (below + 1).clamp(max=self.num_steps - 1)
        fraction = (t - below).to(log_level.dtype)
        return self.split(torch.lerp(log_level[below], log_level[above], fraction).exp())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) in closed form: x_t = alpha_t x_0 + sigma_t noise.

        Ho et al. 2020 (arXiv:2006.11239), Eq. 4, with the alpha_t and sigma_t of any schedule.

        Args:
            x0: Clean latents, (B, C, h, w), standard deviation close to 1.
            noise: Standard normal, same shape, dtype and device as ``x0``.
            t: (B,) in [0, num_steps - 1], int64 or floating; 0 is almost clean, num_steps - 1 almost noise.

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
        super().__init__(*of_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)))


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
        super().__init__(*of_betas(root.square()))


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
        super().__init__(*of_betas((1 - abar[1:] / abar[:-1]).clamp(max=max_beta)))


class Betas(Schedule):
    """Noise variances given one by one: schedules of other programs that have no name here.

    Args:
        values: T variances in (0, 1], first step first. With 1 at the end nothing of x0 is left at T - 1.
    """

    def __init__(self, values: list[float]) -> None:
        super().__init__(*of_betas(torch.tensor(values, dtype=torch.float64)))


class ZeroTerminalSNR(Schedule):
    """Another schedule, moved to end in pure noise: Lin et al. 2023 (arXiv:2305.08891), Algorithm 1.

    sqrt(abar) is shifted to end at 0 and scaled to begin where it began. Training and sampling then agree on
    where an image starts; without it a model never learns to make one much brighter or darker than grey.

    Args:
        schedule: The variance-preserving schedule to move.

    Raises:
        ValueError: If it is not variance preserving.
    """

    def __init__(self, schedule: Schedule) -> None:
        first, last = schedule.alpha[0], schedule.alpha[-1]
        variance = schedule.alpha.square() + schedule.sigma.square()
        if schedule.num_steps < 2 or not torch.allclose(variance, torch.ones_like(variance)):
            raise ValueError(
                "schedule.schedule: ZeroTerminalSNR needs a variance-preserving schedule of at least 2 "
                f"timesteps, got {type(schedule).__name__} with {schedule.num_steps}"
            )
        alpha = (schedule.alpha - last) * (first / (first - last))
        super().__init__(alpha, (1 - alpha.square()).sqrt())


class RectifiedFlow(Schedule):
    """A straight line from data to noise: alpha = 1 - sigma (Liu et al. 2022, arXiv:2209.03003).

    sigma_t = s u / (1 + (s - 1) u) with u = (t + 1) / T and the shift s of Esser et al. 2024
    (arXiv:2403.03206), Eq. 23. The last timestep is pure noise, so epsilon prediction is ruled out.

    Args:
        num_steps: T, number of timesteps.
        shift: s > 0; above 1 more timesteps are noisy, as larger images need.
    """

    def __init__(self, num_steps: int = 1000, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"schedule.shift must be > 0, got {shift}")
        time = torch.arange(1, num_steps + 1, dtype=torch.float64) / max(num_steps, 1)
        # 1 - sigma would leave a rounding error where nothing must be left
        shifted = 1 - time + shift * time
        super().__init__((1 - time) / shifted, shift * time / shifted)

    def split(self, noise_level: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma = 1 - alpha at a finite ``noise_level``."""
        return 1 / (1 + noise_level), noise_level / (1 + noise_level)


def of_betas(beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of a variance-preserving schedule.

    Args:
        beta: Variance of the noise that each step adds, (T,) in (0, 1], first step first.

    Raises:
        ValueError: If ``beta`` is empty or leaves (0, 1].
    """
    beta = beta.double()
    if len(beta) == 0 or not bool(((beta > 0) & (beta <= 1)).all()):
        raise ValueError(f"schedule: expected num_steps >= 1 and every beta in (0, 1], got {_span(beta)}")
    abar = torch.cumprod(1 - beta, dim=0)
    return abar.sqrt(), (1 - abar).sqrt()


def _span(values: Tensor) -> str:
    return f"{len(values)} values" + (f" from {values[0]:.3g} to {values[-1]:.3g}" if len(values) else "")
