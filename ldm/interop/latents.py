"""Our normalisation of latents, per channel, in formats that know one scaling factor.

A pipeline of diffusers, and CompVis's code, multiply latents by one number. What one number cannot express
is folded into the two 1x1 convolutions around the latent: with z' = (z - m) / s, the encoder's last one gives
z', and the decoder's first one takes it. Computed in float64 and rounded once: that cannot be undone exactly,
so the original convolutions are stored with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.interop.model import Latents

FOLDED = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
"""Weights that folding changes."""

Weights = Mapping[str, Tensor]


def scaling_factor(latents: Latents) -> float | None:
    """Return f with z' = f z where there is one: no mean, and one deviation for all channels.

    Of the numbers whose inverse rounds to the deviation it is the one with the fewest digits, so that what
    came as 0.18215 leaves as 0.18215.
    """
    std = latents.std[0]
    if latents.mean.any() or not torch.equal(latents.std, std.expand_as(latents.std)):
        return None
    factors = (float(f"{1 / std.item():.{digits}g}") for digits in range(1, 18))
    return next((f for f in factors if torch.equal(of_factor(f, 1).std[0], std)), 1 / std.item())


def shortest(value: float) -> float:
    """Return the number of the fewest digits that float32 rounds to ``value``."""
    return float(str(np.float32(value)))


def of_factor(factor: float, channels: int) -> Latents:
    """Return the normalisation z' = ``factor`` z."""
    std = torch.tensor(1 / factor, dtype=torch.float64).float()
    return Latents(torch.zeros(channels), std.repeat(channels))


def of_statistics(mean: Sequence[float], std: Sequence[float]) -> Latents:
    """Return the normalisation z' = (z - ``mean``) / ``std``, a number per channel."""
    return Latents(*(torch.tensor(values, dtype=torch.float64).float() for values in (mean, std)))


def complete(weights: Weights, channels: int) -> dict[str, Tensor]:
    """Add the two 1x1 convolutions around the latent, as identities, to an autoencoder that has none."""
    identities = {
        f"{name}.{kind}": torch.eye(width)[:, :, None, None] if kind == "weight" else torch.zeros(width)
        for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels))
        for kind in ("weight", "bias")
    }
    is_complete = any(name in weights for name in FOLDED)
    return dict(weights) if is_complete else {**weights, **identities}


def stripped(weights: Weights) -> dict[str, Tensor]:
    """Leave the two 1x1 convolutions around the latent out where they are identities: undoes ``complete``."""
    channels = weights["post_quant_conv.bias"].shape[0]
    bare = {name: tensor for name, tensor in weights.items() if name not in FOLDED}
    same = complete(bare, channels)
    return bare if all(torch.equal(weights[name], same[name]) for name in FOLDED) else dict(weights)


def fold(weights: Weights, latents: Latents) -> dict[str, Tensor]:
    """Make an autoencoder's latents normalised ones.

    The mean's rows of ``quant_conv`` become (W - m) / s, those of the log-variance get - 2 ln s, and
    ``post_quant_conv`` takes z' s + m for z. The bounds on the log-variance, -30 and 20, are not moved.

    Args:
        weights: State dict of a ``KLAutoencoder``, or the four weights that are changed.
        latents: The normalisation.
    """
    m, s = latents.mean.double(), latents.std.double()
    q_w, q_b, p_w, p_b = (weights[name].double() for name in FOLDED)
    channels = len(m)
    scale = torch.cat([1 / s, torch.ones_like(s)])
    shift = torch.cat([-m / s, -2 * s.log()])
    folded = (
        q_w * scale.view(-1, 1, 1, 1),
        q_b * scale + shift,
        p_w * s.view(1, -1, 1, 1),
        p_b + (p_w.view(channels, channels) * m).sum(1),
    )
    return {name: tensor.float() for name, tensor in zip(FOLDED, folded, strict=True)}


def originals(weights: Weights, latents: Latents) -> dict[str, Tensor]:
    """Return what undoes ``fold`` exactly, to be stored with the folded weights."""
    unfolded = {name: weights[name] for name in FOLDED}
    return {**unfolded, "latent_mean": latents.mean, "latent_std": latents.std}


def unfold(weights: Weights, original: Weights) -> tuple[dict[str, Tensor], Latents] | None:
    """Undo ``fold`` with the originals, unless the weights were changed since.

    Args:
        weights: State dict with folded weights, float32.
        original: What ``originals`` returned.

    Returns:
        The state dict as it was and its normalisation; None if folding ``original`` gives other weights.
    """
    if set(original) != {*FOLDED, "latent_mean", "latent_std"}:
        return None
    latents = Latents(original["latent_mean"], original["latent_std"])
    same = all(torch.equal(weights[name], tensor) for name, tensor in fold(original, latents).items())
    return ({**weights, **{name: original[name] for name in FOLDED}}, latents) if same else None
