"""A straight line from data to noise for a certain size of latents."""

from __future__ import annotations

from ldm.diffusion.schedule import RectifiedFlow


class ResolutionFlow(RectifiedFlow):
    """RectifiedFlow with the shift sqrt(m / n) for m instead of n pixels: Esser et al. 2024, Eq. 23.

    A larger image of the same noise level is easier to make out, by the root of the number of its pixels
    (arXiv:2403.03206, sec. 5.3.2), so that it needs more noise.

    Args:
        side: Side of the latents, in pixels of theirs.
        base_side: Side at which nothing is shifted: 32 is a latent of 256 pixels.
        num_steps: T, number of timesteps.
    """

    def __init__(self, side: int, base_side: int = 32, num_steps: int = 1000) -> None:
        if side < 1 or base_side < 1:
            raise ValueError(f"schedule: side and base_side must be at least 1, got {side} and {base_side}")
        super().__init__(num_steps, side / base_side)
