"""Euler's method on the probability flow, plain and with ancestral noise.

In the coordinates x / alpha and l = sigma / alpha, the noise level, of Karras et al. 2022 (arXiv:2206.00364),
Eq. 4, the flow is d(x / alpha) / d l = eps_hat, so an Euler step leads to alpha_s (x / alpha + (l_s - l)
eps_hat) = alpha_s x0_hat + sigma_s eps_hat: DDIM. On the straight line of rectified flow, dx / d sigma =
eps_hat - x0_hat, it is the same formula. So these are DDIM under the names that other programs use.
"""

from __future__ import annotations

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.spacing import Spacing


class Euler(DDIM):
    """Euler's method: Karras et al. 2022 (arXiv:2206.00364), Algorithm 1 without its correction.

    On RectifiedFlow it is what others call flow Euler.

    Args:
        num_steps: Calls of the denoiser.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 30, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, eta=0.0, spacing=spacing)


class EulerAncestral(DDIM):
    """Euler's method to a level below the next, and fresh noise up to it (k-diffusion); the law of DDPM.

    Args:
        num_steps: Calls of the denoiser.
        spacing: Which timesteps; equal steps from the noisiest unless given.
    """

    def __init__(self, num_steps: int = 30, spacing: Spacing | None = None) -> None:
        super().__init__(num_steps, eta=1.0, spacing=spacing)
