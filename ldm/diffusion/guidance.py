"""Guidance: combine a conditional and an unconditional estimate of x0 into one.

For a fixed x_t, eps_hat and v_hat are affine in x0_hat, and guidance takes combinations whose weights sum
to 1. So it makes no difference whether they are taken of eps_hat, as in the papers, or of x0_hat, as here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ldm.io.config import Configurable
from ldm.types import Batch, Conditional, Denoise


class Guidance(Configurable, nn.Module, ABC):
    """Combines the conditional and the unconditional estimate of a model into one denoiser.

    A module, because a guidance may hold a network of its own, or another guidance that does: they move
    between devices with the stage, and any of them can replace another.
    """

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints of networks of its own, with their SHA-256."""
        return {}

    @property
    def uses_uncond(self) -> bool:
        """Whether it uses the estimate without condition, or of what is guided away from."""
        return True

    @abstractmethod
    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Combine.

        Args:
            model: Gives estimates of x0 with and without condition; only what is used is computed.
            batch: What the samples are conditioned on.
        """


class Unguided(Guidance):
    """The conditional estimate as it is."""

    uses_uncond = False

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Return the conditional estimate; the other is not computed."""
        return model.cond(batch)


class ClassifierFree(Guidance):
    """Classifier-free guidance: Ho & Salimans 2022 (arXiv:2207.12598), Eq. 6, with scale = 1 + w.

    x0_hat = uncond + scale (cond - uncond).

    Args:
        scale: 0 ignores the condition, 1 samples the conditional model, more trades diversity for
            agreement with the condition. At 0 and 1 only one of the two is evaluated.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    @property
    def uses_uncond(self) -> bool:
        """At all scales but 1."""
        return self.scale != 1.0

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Extrapolate from the unconditional estimate through the conditional one."""
        if self.scale == 1.0:
            return model.cond(batch)
        if self.scale == 0.0:
            return model.uncond(batch)
        estimates = model.cond_and_uncond(batch)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            (cond, rest), uncond = _split(estimates(x_t, t), x_t)
            return _joined(uncond + self.scale * (cond - uncond), rest)

        return guided


class Rescaled(Guidance):
    """Classifier-free guidance that keeps the contrast: Lin et al. 2023 (arXiv:2305.08891), Eq. 13 to 16.

    The guided estimate is scaled to the standard deviation of the conditional one, and mixed with what it
    was. The paper does so with the network's output; here it is x0_hat, whose deviation is what over-exposes
    an image, so that every prediction gives the same. At alpha = 0 with velocity prediction the two are the
    same.

    Args:
        scale: As in ClassifierFree; at 1 the conditional estimate is left as it is.
        rescale: phi in [0, 1], weight of the scaled estimate; 0.7 in the paper, 0 is ClassifierFree.
    """

    def __init__(self, scale: float, rescale: float = 0.7) -> None:
        if not 0.0 <= rescale <= 1.0:
            raise ValueError(f"guidance.rescale must be in [0, 1], got {rescale}")
        super().__init__()
        self.scale = scale
        self.rescale = rescale

    @property
    def uses_uncond(self) -> bool:
        """At all scales but 1."""
        return self.scale != 1.0

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Guide, then restore each sample's standard deviation over (C, h, w)."""
        if self.scale == 1.0:
            return model.cond(batch)
        estimates = model.cond_and_uncond(batch)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            (cond, rest), uncond = _split(estimates(x_t, t), x_t)
            x0 = uncond + self.scale * (cond - uncond)
            wanted, found = (each.flatten(1).std(1).clamp_min(1e-8) for each in (cond, x0))
            return _joined(x0 * (1 + self.rescale * (wanted / found - 1)).view(-1, 1, 1, 1), rest)

        return guided


class Interval(Guidance):
    """Guidance at medium noise levels only: Kynkäänniemi et al. 2024 (arXiv:2404.07724).

    Elsewhere the conditional estimate is used alone, which costs one evaluation less. At high noise guidance
    takes diversity away, at low noise it has no effect.

    Args:
        guidance: What to do inside of the interval.
        low: First timestep of it.
        high: Last timestep of it.
    """

    def __init__(self, guidance: Guidance, low: float, high: float) -> None:
        if low > high:
            raise ValueError(f"guidance.low must be at most guidance.high, got {low} and {high}")
        super().__init__()
        self.guidance = guidance
        self.low = low
        self.high = high

    @property
    def upstream(self) -> dict[str, str]:
        """Those of the guidance inside."""
        return self.guidance.upstream

    @property
    def uses_uncond(self) -> bool:
        """If the guidance inside does."""
        return self.guidance.uses_uncond

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Choose by timestep; samples of one call may be inside and outside."""
        cond, guided = model.cond(batch), self.guidance(model, batch)

        def within(x_t: Tensor, t: Tensor) -> Tensor:
            first = t if t.ndim == 1 else t[:, 0]
            inside = (first >= self.low) & (first <= self.high)
            if not inside.any():
                return cond(x_t, t)
            if inside.all():
                return guided(x_t, t)
            return torch.where(inside.view(-1, 1, 1, 1), guided(x_t, t), cond(x_t, t))

        return within


class NegativePrompt(Guidance):
    """A guidance that leads all images away from one caption instead of from the empty one.

    Samples with a caption of their own to be guided away from, as of ``ldm.sample``, keep it.

    Args:
        prompt: The caption.
        guidance: How to guide, at a scale other than 1.

    Raises:
        ValueError: If ``guidance`` does not use the estimate that the caption's takes the place of; when it
            guides a model that is not conditioned on captions.
    """

    def __init__(self, prompt: str, guidance: Guidance) -> None:
        super().__init__()
        if not guidance.uses_uncond:
            raise ValueError(
                f"guidance.guidance: {type(guidance).__name__} does not use a negative prompt, expected such "
                "as ClassifierFree at a scale other than 1"
            )
        self.prompt, self.guidance = prompt, guidance

    @property
    def upstream(self) -> dict[str, str]:
        """Those of the guidance inside."""
        return self.guidance.upstream

    def __call__(self, model: Conditional, batch: Batch) -> Denoise:
        """Guide away from the caption."""
        if "text" not in batch:
            raise ValueError("guidance: NegativePrompt guides a model that is not conditioned on captions")
        negative = [self.prompt] * len(batch["text"])
        return self.guidance(model, {**batch, "negative_text": batch.get("negative_text", negative)})


def extrapolated(base: Denoise, through: Denoise, scale: float) -> Denoise:
    """Go from one estimate through another: base + scale (through - base).

    Args:
        base: What to go away from.
        through: What to go towards; reached at scale 1.
        scale: How far.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        (towards, rest), x0 = _split((through(x_t, t), base(x_t, t)), x_t)
        return _joined(x0 + scale * (towards - x0), rest)

    return guided


def clamped(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """Keep x0_hat in the range of the data: for pixels, which have one.

    Args:
        denoise: What to clamp; put guidance inside, since it overshoots.
        low: Smallest value of the data.
        high: Largest value of the data.
    """
    return lambda x_t, t: denoise(x_t, t).clamp(low, high)


def inpainted(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Fix x0_hat to known values outside of the mask.

    A deterministic sampler that starts from alpha known + sigma eps there stays on that trajectory, and ends
    with the known values.

    Args:
        denoise: Estimate of the rest, guidance included.
        known: x0 where the mask is 0, (B, C, h, w).
        mask: 1 where to paint, 0 where x0 is known; broadcasts over ``known``.
    """
    return lambda x_t, t: torch.where(mask > 0, denoise(x_t, t), known)


def _split(estimates: tuple[Tensor, Tensor], x_t: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Take x0_hat of two estimates, and of the first one what follows it: a learned variance, or nothing."""
    channels = x_t.shape[1]
    return (estimates[0][:, :channels], estimates[0][:, channels:]), estimates[1][:, :channels]


def _joined(x0: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([x0, rest], dim=1) if rest.shape[1] else x0
