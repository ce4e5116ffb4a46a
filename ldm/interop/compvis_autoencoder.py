"""The autoencoder of a single file: alone, or inside of a model, with what normalises its latents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.interop import compvis_facts
from ldm.interop.compvis_keys import autoencoder_modules, below
from ldm.interop.compvis_networks import network, renamed
from ldm.interop.compvis_shapes import autoencoder_arguments
from ldm.interop.latents import (
    complete,
    fold,
    of_factor,
    of_statistics,
    originals,
    scaling_factor,
    shortest,
    stripped,
    unfold,
)
from ldm.interop.model import Latents, Network
from ldm.nets.autoencoder import KLAutoencoder

PREFIX = "first_stage_model."
"""Prefix of an autoencoder's weights in a model; in some files of ComfyUI ``vae.``."""
MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""Beginnings of their names in a file of its own."""
UNFOLDED = "ldm_latents."
"""The same of ours, see ``latents.originals``."""
METADATA = "ldm"
"""Key of our files' metadata: arguments that weights do not determine."""
EDM_FACTOR = 0.5
"""Scaling factor of a file with statistics per channel, ``edm_mean`` and ``edm_std`` (Playground 2.5)."""
SCALE = 0.18215
"""Scaling factor of Stable Diffusion's latents."""
SCALE_GUESSED = (
    f"the file has no scale of its latents: assumed to be Stable Diffusion's, {SCALE}; for another one say "
    "--scaling-factor, for Stable Diffusion XL's 0.13025"
)
NO_SCALE = (
    "the file has no scale of its {} latent channels: say --scaling-factor and --shift-factor, Stable "
    "Diffusion 3: 1.5305 and 0.0609, FLUX: 0.3611 and 0.1159"
)
Weights = Mapping[str, Tensor]


def find_autoencoder(weights: Weights, name: str) -> dict[str, Tensor]:
    """Find the autoencoder in a file; what trained it (loss.*) is left out.

    Raises:
        ValueError: If there is none; the message names what the file is.
    """
    theirs = below(weights, PREFIX) or below(weights, "vae.")
    if not theirs:
        compvis_facts.refuse_others(weights, name)
        theirs = {key: value for key, value in weights.items() if key.startswith(MODULES)}
    if "encoder.conv_in.weight" not in theirs:
        raise ValueError(
            f"{name}: the file has no U-Net, expected model.diffusion_model.*, nor an autoencoder, encoder.*"
        )
    return theirs


def read_autoencoder(
    weights: Weights,
    theirs: Weights,
    metadata: Mapping[str, str],
    factor: float | None,
    shift: float | None,
    where: str,
) -> tuple[Network, Latents, list[str]]:
    """Read the autoencoder; also note a guess of its scale.

    Args:
        weights: All weights of the file.
        theirs: Those of the autoencoder, without prefix.
        metadata: Of the file.
        factor: Value of --scaling-factor, or None.
        shift: Value of --shift-factor, or None.
        where: The file, for messages.

    Raises:
        ValueError: If weights are missing, or no source states the normalisation of latents, or two do.
    """
    # 1x1 convolutions there, matrices here
    theirs = {key: w.flatten(1) if ".attn" in key and w.ndim == 4 else w for key, w in theirs.items()}
    ours = json.loads(metadata.get(METADATA, "{}"))
    arguments = ours.get("autoencoder") or autoencoder_arguments(theirs, where)
    theirs = complete(theirs, arguments["latent_channels"])

    def build() -> nn.Module:
        return KLAutoencoder(**arguments)

    found = network(theirs, build, arguments, autoencoder_modules(arguments), where)
    latents, notes = _latents(weights, ours.get("latents"), metadata, arguments, (factor, shift), where)
    is_plain = latents.std.eq(1).all() and not latents.mean.any()
    if unfolded := unfold(found.weights, below(weights, UNFOLDED)) if is_plain else None:
        return Network(arguments, unfolded[0]), unfolded[1], []
    return found, latents, notes


def write_autoencoder_weights(autoencoder: Network, latents: Latents) -> dict[str, Tensor]:
    """Return an autoencoder inside of a model: what ``scale_factor`` cannot express is folded."""
    factor, weights, original = scaling_factor(latents), autoencoder.weights, {}
    if factor is None or not torch.equal(_stored(factor, len(latents.mean)).std, latents.std):
        original = originals(weights, latents)
        weights, factor = {**weights, **fold(weights, latents)}, 1.0
    return {
        **_theirs(weights, autoencoder.arguments, PREFIX),
        **{f"{UNFOLDED}{key}": w for key, w in original.items()},
        "scale_factor": torch.tensor(factor),
    }


def write_alone(autoencoder: Network, latents: Latents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a file of an autoencoder alone, and what belongs under ``METADATA``.

    Such files have no scale: whoever reads one has to know it. Ours have it in the metadata.
    """
    statistics = {"mean": latents.mean.tolist(), "std": latents.std.tolist()}
    weights = _theirs(stripped(autoencoder.weights), autoencoder.arguments, "")
    return weights, {"autoencoder": autoencoder.arguments, "latents": statistics}


def _theirs(weights: Weights, arguments: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    found = renamed(weights, autoencoder_modules(arguments), prefix)
    return {key: w[:, :, None, None] if ".attn" in key and w.ndim == 2 else w for key, w in found.items()}


def _latents(
    weights: Weights,
    ours: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    arguments: Mapping[str, Any],
    options: tuple[float | None, float | None],
    where: str,
) -> tuple[Latents, list[str]]:
    """Find the normalisation of latents: stated by the file, by options, or the usual one."""
    channels = arguments["latent_channels"]
    if ours:
        return _unless_given(of_statistics(ours["mean"], ours["std"]), options, "statistics", where)
    if "edm_mean" in weights and "edm_std" in weights:
        mean, std = (weights[key].flatten().tolist() for key in ("edm_mean", "edm_std"))
        stated = of_statistics(mean, [each / EDM_FACTOR for each in std])
        return _unless_given(stated, options, "edm_mean and edm_std", where)
    factor, shift = options
    if "scale_factor" in weights:
        stated_factor = _shortest(weights["scale_factor"])
        if factor not in (None, stated_factor):
            raise ValueError(
                f"--scaling-factor: got {factor}, but {where} has {stated_factor}: leave the option out"
            )
        return _shifted(of_factor(stated_factor, channels), shift or 0.0), []
    family = compvis_facts.family(weights, metadata, channels)
    if factor is None and family is None and channels != 4:
        raise ValueError(f"{where}: {NO_SCALE.format(channels)}")
    notes = [SCALE_GUESSED] if factor is None and family is None else []
    usual = (family.factor, family.shift) if family else (SCALE, 0.0)
    used = [given if given is not None else value for given, value in zip(options, usual, strict=True)]
    return _shifted(of_factor(used[0], channels), used[1]), notes


def _unless_given(
    stated: Latents, options: tuple[float | None, float | None], what: str, where: str
) -> tuple[Latents, list[str]]:
    for option, value in zip(("scaling", "shift"), options, strict=True):
        if value is not None:
            raise ValueError(
                f"--{option}-factor: got {value}, but {where} has {what} of its latents: leave the option out"
            )
    return stated, []


def _shifted(latents: Latents, shift: float) -> Latents:
    return replace(latents, mean=torch.full_like(latents.mean, shift))


def _shortest(value: Tensor) -> float:
    """Return the number of the fewest digits that is ``value``: 0.18215, not 0.18215000331, nor its half."""
    if value.item() == torch.tensor(SCALE).to(value.dtype).item():
        return SCALE
    return shortest(value.item())


def _stored(factor: float, channels: int) -> Latents:
    """Return what is read back where ``factor`` is written in float32."""
    return of_factor(_shortest(torch.tensor(factor)), channels)
