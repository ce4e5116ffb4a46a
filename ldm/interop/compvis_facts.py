"""Kind and diffusion process of a single file: by names, marker tensors and metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import ScaledLinear
from ldm.interop.schedules import betas

OTHERS = {
    r"(?i)(^|[._])(lora|hada|lokr)[._]": "a LoRA, which changes a model: merge it into its model first",
    r"^(string_to_param|emb_params)": "a textual inversion, expected a model",
    r"^(control_model|controlnet)": "a ControlNet, expected a model",
    r"^quantize\.": "a VQ autoencoder, expected one with a KL term",
    r"^bn\.running_mean": "FLUX.2's autoencoder, which has a batch norm, expected one without",
    r"^(down|up|encoder\.down)_blocks\.": "a part of a folder of diffusers: import the folder",
}
"""Kinds of files that cannot be imported, by a name that shows each."""


@dataclass(frozen=True)
class Family:
    """Models that share an autoencoder, which normalises latents as (z - shift) * factor.

    Args:
        name: What they are called.
        factor: Scaling factor of the latents.
        shift: Shift factor.
        channels: Channels of the latents.
    """

    name: str
    factor: float
    shift: float = 0.0
    channels: int = 4


XL = Family("Stable Diffusion XL", 0.13025)
SD3 = Family("Stable Diffusion 3", 1.5305, 0.0609, 16)
FLUX = Family("FLUX", 0.3611, 0.1159, 16)
FAMILIES = {
    r"^conditioner\.embedders\.": XL,
    r"(^|\.)joint_blocks\.": SD3,
    r"(^|\.)double_blocks\.": FLUX,
}
"""Families whose diffusion models cannot be imported, by the name of a weight of these."""
ARCHITECTURES = {
    "stable-diffusion-v1": Family("Stable Diffusion 1", 0.18215),
    "stable-diffusion-v2": Family("Stable Diffusion 2", 0.18215),
    "stable-diffusion-xl": XL,
    "stable-diffusion-3": SD3,
    "stable-diffusion-v3": SD3,
    "flux": FLUX,
}
"""Families by how ``modelspec.architecture`` of a file's metadata begins."""
PREDICTIONS = {"epsilon": "epsilon", "velocity": "v_prediction", "sample": "sample"}
"""Names of predictions, ours first, then diffusers'."""
SPELLINGS = {name: name for name in PREDICTIONS} | {
    "v": "velocity",
    "v_prediction": "velocity",
    "eps": "epsilon",
}
"""Our names of predictions, by what metadata may call them."""
VELOCITY = (
    "the file does not show what the U-Net predicts: assumed to be the noise, as in Stable Diffusion 1.x and "
    "2.x-base; for 2.x at 768 pixels say --prediction velocity"
)
ZERO_SNR = (
    "the file is marked as of zero terminal SNR, and not by what it predicts: assumed to be the velocity"
)
BETAS = "the file has no betas: assumed to be Stable Diffusion's"
SAMPLER = {"_class_name": "PNDMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
"""Sampler of CompVis's script, as a scheduler_config.json."""
TRAILING = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
"""With zero terminal SNR sampling has to begin at the last timestep: Lin et al. 2023 (arXiv:2305.08891)."""

Weights = Mapping[str, Tensor]


def refuse_others(weights: Weights, name: str) -> None:
    """Name the kind of a file that is no Stable Diffusion.

    Raises:
        ValueError: If it is of one of ``OTHERS``.
    """
    for pattern, kind in OTHERS.items():
        if key := next((key for key in weights if re.search(pattern, key)), None):
            raise ValueError(f"{name}: the file is {kind} ({key})")


def refuse_families(weights: Weights, name: str) -> None:
    """Name the family of a model whose U-Net or transformer is none of ours.

    Raises:
        ValueError: If it is of one of ``FAMILIES``.
    """
    for pattern, found in FAMILIES.items():
        if key := next((key for key in weights if re.search(pattern, key)), None):
            raise ValueError(
                f"{name}: the file is {found.name} ({key}), expected Stable Diffusion 1.x or 2.x; for its "
                "autoencoder alone say --only autoencoder"
            )


def family(weights: Weights, metadata: Mapping[str, str], channels: int) -> Family | None:
    """Find the family of a file's autoencoder by the other weights or by its metadata."""
    architecture = metadata.get("modelspec.architecture", "").lower()
    names = "\n".join(weights)
    by_weights = [found for pattern, found in FAMILIES.items() if re.search(pattern, names, re.MULTILINE)]
    by_metadata = [found for start, found in ARCHITECTURES.items() if architecture.startswith(start)]
    return next((found for found in by_weights + by_metadata if found.channels == channels), None)


def left_out(weights: Weights, taken: tuple[str, ...]) -> list[str]:
    """List the weights of a file that belong to no network; tables of numbers are none.

    Args:
        weights: All weights of the file.
        taken: How the names of the parts' weights begin.
    """
    rest = [key for key, value in weights.items() if value.ndim > 1 and not key.startswith(taken)]
    kinds = [
        kind.partition(",")[0] for pattern, kind in OTHERS.items() if re.search(pattern, "\n".join(rest))
    ]
    return (
        [f"left out {len(rest)} weights of {kinds[0] if kinds else 'other parts'} ({rest[0]})"]
        if rest
        else []
    )


def scheduler(
    weights: Weights,
    metadata: Mapping[str, str],
    ours: Mapping[str, Any] | None,
    prediction: str | None,
    is_open_clip: bool,
    name: str,
) -> tuple[dict[str, Any], list[str]]:
    """Find the equivalent scheduler_config.json, and which values are guesses.

    Args:
        weights: All weights of the file; ``v_pred`` and ``ztsnr`` are empty tensors that mark it.
        metadata: That of a safetensors file.
        ours: scheduler_config.json in the metadata of a file that we wrote.
        prediction: Value of --prediction, or None.
        is_open_clip: Whether the text tower is that of 2.x, where the prediction differs from file to file.
        name: The file, for messages.

    Raises:
        ValueError: If the option contradicts the file, or the file itself without an option.
    """
    stated = _stated(weights, metadata, ours, name)
    kind = _agreed(stated, prediction, name)
    if ours:
        return {**ours, **({"prediction_type": PREDICTIONS[kind]} if kind else {})}, []
    beta = usual = betas(ScaledLinear())
    if (found := weights.get("betas")) is not None and not torch.equal(found, usual.to(found.dtype)):
        beta = found.double()
    zero_snr = "ztsnr" in weights or metadata.get("ss_zero_terminal_snr") == "True"
    guesses = {
        BETAS: "betas" not in weights,
        ZERO_SNR: kind is None and zero_snr,
        VELOCITY: kind is None and not zero_snr and is_open_clip,
    }
    kind = kind or ("velocity" if zero_snr else "epsilon")
    config = {**(TRAILING if zero_snr else SAMPLER), "trained_betas": beta.tolist()}
    return config | {"prediction_type": PREDICTIONS[kind]}, [note for note, is_so in guesses.items() if is_so]


def image_size(metadata: Mapping[str, str]) -> int | None:
    """Read the side of square images from ``modelspec.resolution``, e.g. 768x768."""
    found = re.fullmatch(r"(\d+)x\1", metadata.get("modelspec.resolution", ""))
    return int(found[1]) if found else None


def _stated(
    weights: Weights, metadata: Mapping[str, str], ours: Mapping[str, Any] | None, name: str
) -> dict[str, str]:
    """Collect the predictions stated in the file, by the key that states them."""
    stated = {"marker v_pred": "v"} if "v_pred" in weights else {}
    if metadata.get("ss_v_parameterization") == "True":
        stated["ss_v_parameterization"] = "v"
    stated |= {key: metadata[key] for key in ("modelspec.prediction_type",) if key in metadata}
    if ours and "prediction_type" in ours:
        stated["scheduler's prediction_type"] = ours["prediction_type"]
    for key, value in stated.items():
        if value not in SPELLINGS:
            raise ValueError(f"{name}: {key} is {value}, expected {', '.join(SPELLINGS)}")
    return {key: SPELLINGS[value] for key, value in stated.items()}


def _agreed(stated: Mapping[str, str], option: str | None, name: str) -> str | None:
    """Return the prediction that the file and the option agree on; None if neither states one."""
    kinds, sources = set(stated.values()), ", ".join(f"{key} says {kind}" for key, kind in stated.items())
    if option is None and len(kinds) > 1:
        raise ValueError(f"{name}: the file contradicts itself ({sources}): decide with --prediction")
    if option is not None and kinds and option not in kinds:
        raise ValueError(f"--prediction: got {option}, but {name} states another ({sources}): leave it out")
    return option or next(iter(kinds), None)
