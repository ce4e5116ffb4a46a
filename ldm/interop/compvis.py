"""Stable Diffusion as CompVis saved it: U-Net, autoencoder and text tower in one file of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.diffusion.schedule import ScaledLinear
from ldm.interop.compvis_keys import Pairs, autoencoder_modules, averaged, below, names, unet_modules
from ldm.interop.compvis_shapes import autoencoder_arguments, unet_arguments, unet_widths
from ldm.interop.compvis_text import OPEN_CLIP, read_text, write_text_tower
from ldm.interop.files import record
from ldm.interop.latents import fold, of_factor, originals, scaling_factor, unfold
from ldm.interop.model import Latents, Network, TextToImage
from ldm.interop.runs import read_run, write_run
from ldm.interop.schedules import betas, build, process, scheduler_config
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import check, read_metadata, read_weights, sha256, write_weights
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet

UNET, AUTOENCODER, UNFOLDED = "model.diffusion_model.", "first_stage_model.", "ldm_latents."
"""How the names of weights begin; the last is ours, see ``latents.originals``."""
SAMPLER = {"_class_name": "PNDMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
"""Sampler of CompVis's script, as a scheduler_config.json."""
METADATA = "ldm"
"""Key of our files' metadata: arguments that weights do not determine."""
VELOCITY = (
    "the file does not show what the U-Net predicts: assumed to be the noise, as in Stable Diffusion 1.x and "
    "2.x-base; for 2.x at 768 pixels say --prediction velocity"
)
BETAS = "the file has no betas: assumed to be Stable Diffusion's"
PREDICTIONS = {"epsilon": "epsilon", "velocity": "v_prediction", "sample": "sample"}
"""Names of predictions, ours first."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ImportOptions:
    """Facts that weights do not determine. None takes the file's metadata, or else the usual value.

    Args:
        weights: Averaged ones, or those that were trained; usual are averaged ones where they are there.
        prediction: What the U-Net predicts; usual is the noise, "epsilon".
        num_heads: Heads of the U-Net at every level; usual are 8 with convolutional projections (1.x), and
            heads of 64 channels with linear ones (2.x).
        image_size: Side of the images that it was trained on; usual is 512.
    """

    weights: Literal["ema", "raw"] | None = None
    prediction: Literal["epsilon", "velocity", "sample"] | None = None
    num_heads: int | None = None
    image_size: int | None = None


def import_file(file: str | Path, out: str | Path, options: ImportOptions) -> tuple[Path, list[str]]:
    """Turn a single file of Stable Diffusion 1.x or 2.x into run folders of ours.

    Args:
        file: Weights with the names that CompVis gave them, .ckpt or .safetensors.
        out: Folder for the run folders autoencoder, text and diffusion.
        options: Facts that the weights do not determine.

    Returns:
        The run folder of the diffusion stage, and what had to be guessed.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, lacks a part, or is of a kind that cannot be expressed here.
    """
    file = Path(file)
    weights = read_weights(file)
    metadata = json.loads(read_metadata(file).get(METADATA, "{}"))
    unet, kind = _read_unet(weights, metadata.get("unet"), options, str(file))
    autoencoder, latents = _read_autoencoder(weights, metadata.get("autoencoder"), str(file))
    text = read_text(weights, str(file))
    scheduler, guessed = _scheduler(weights, metadata, options)
    size = options.image_size or metadata.get("image_size") or 512
    text = Network(metadata.get("text", text.arguments), text.weights)
    model = TextToImage(unet, autoencoder, text, latents, process(scheduler, str(file)), size)
    model.check(dict.fromkeys(("unet", "autoencoder", "text"), str(file)))
    source = {"program": "CompVis", "name": file.name, "sha256": sha256(file), "weights": kind}
    return write_run(model, out, source), guessed


def export_file(run: str | Path, file: str | Path) -> Path:
    """Write a trained text-to-image run as a single file with CompVis's names.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has parts that Stable Diffusion has not, or the file cannot be written.
    """
    file = Path(file)
    if file.suffix != ".safetensors" or file.exists():
        found = "is there already" if file.exists() else f"ends in '{file.suffix}'"
        raise ValueError(f"--out: '{file}' {found}, expected a new file that ends in .safetensors")
    checkpoint = Checkpoint.open(run, "diffusion")
    model, metadata = read_run(checkpoint), record(checkpoint)
    arguments = {
        **{name: getattr(model, name).arguments for name in ("unet", "autoencoder", "text")},
        "scheduler": scheduler_config(model.process),
        "image_size": model.image_size,
    }
    tensors = {
        **_renamed(model.unet.weights, unet_modules(model.unet.arguments), UNET),
        **_write_autoencoder(model),
        **write_text_tower(model.text),
        **_tables(model),
    }
    write_weights(file, tensors, {METADATA: json.dumps(arguments), "record": json.dumps(metadata)})
    return file


def _read_unet(
    weights: Weights, metadata: dict[str, Any] | None, options: ImportOptions, name: str
) -> tuple[Network, str]:
    """Read the U-Net; also return which of its weights."""
    raw = _under(weights, UNET, f"{name}: the file has no U-Net")
    ema = {key: weights[averaged(key)] for key in raw if averaged(key) in weights}
    if options.weights == "ema" and not ema:
        raise ValueError(f"{name}: the file has no averaged weights (model_ema.*), expected --weights raw")
    kind = options.weights or ("ema" if ema else "raw")
    theirs = ema if kind == "ema" else raw
    arguments = metadata or unet_arguments(raw, name)
    if options.num_heads is not None:
        arguments = {**arguments, "num_heads": options.num_heads}
    widths = unet_widths(raw, name)

    def unet() -> nn.Module:
        return UNet(widths, **arguments)

    return _network(theirs, unet, arguments, unet_modules(arguments), f"{name} ({UNET}*)"), kind


def _read_autoencoder(
    weights: Weights, metadata: dict[str, Any] | None, name: str
) -> tuple[Network, Latents]:
    found = _under(weights, AUTOENCODER, f"{name}: the file has no autoencoder")
    # 1x1 convolutions there, matrices here
    theirs = {key: w.flatten(1) if ".attn_1." in key and w.ndim == 4 else w for key, w in found.items()}
    where = f"{name} ({AUTOENCODER}*)"
    arguments = metadata or autoencoder_arguments(theirs, where)

    def autoencoder() -> nn.Module:
        return KLAutoencoder(**arguments)

    network = _network(theirs, autoencoder, arguments, autoencoder_modules(arguments), where)
    factor = _shortest(weights["scale_factor"]) if "scale_factor" in weights else 0.18215
    if unfolded := unfold(network.weights, below(weights, UNFOLDED)) if factor == 1.0 else None:
        return Network(arguments, unfolded[0]), unfolded[1]
    return network, of_factor(factor, arguments["latent_channels"])


def _write_autoencoder(model: TextToImage) -> dict[str, Tensor]:
    factor, weights, original = scaling_factor(model.latents), model.autoencoder.weights, {}
    channels = len(model.latents.mean)
    if factor is None or not torch.equal(_stored(factor, channels).std, model.latents.std):
        original = originals(weights, model.latents)
        weights, factor = {**weights, **fold(weights, model.latents)}, 1.0
    theirs = _renamed(weights, autoencoder_modules(model.autoencoder.arguments), AUTOENCODER)
    return {
        **{key: w[:, :, None, None] if ".attn_1." in key and w.ndim == 2 else w for key, w in theirs.items()},
        **{f"{UNFOLDED}{key}": w for key, w in original.items()},
        "scale_factor": torch.tensor(factor),
    }


def _scheduler(
    weights: Weights, metadata: Mapping[str, Any], options: ImportOptions
) -> tuple[dict[str, Any], list[str]]:
    """Return the equivalent scheduler_config.json, and which values are guesses."""
    guessed = []
    if not (config := metadata.get("scheduler")):
        beta = weights["betas"].double() if "betas" in weights else betas(ScaledLinear())
        guessed += [] if "betas" in weights else [BETAS]
        if options.prediction is None and any(key.startswith(OPEN_CLIP) for key in weights):
            guessed.append(VELOCITY)
        config = {**SAMPLER, "trained_betas": beta.tolist()}
    if options.prediction is not None:
        config = {**config, "prediction_type": PREDICTIONS[options.prediction]}
    return config, guessed


def _tables(model: TextToImage) -> dict[str, Tensor]:
    """Return the buffers of the schedule that CompVis saves, (T,) float32."""
    schedule = build(model.process.schedule)
    abar = schedule.alpha.square()
    tables = {
        "betas": betas(schedule),
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": torch.cat([abar.new_ones(1), abar[:-1]]),
        "sqrt_alphas_cumprod": schedule.alpha,
        "sqrt_one_minus_alphas_cumprod": schedule.sigma,
    }
    return {name: table.float() for name, table in tables.items()}


def _network(
    theirs: Weights, build: Callable[[], nn.Module], arguments: dict[str, Any], modules: Pairs, name: str
) -> Network:
    """Rename the weights of the network that ``build`` makes, and check their shapes."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build().state_dict().items()}
    known = names(shapes, modules)
    check(theirs, {known[key]: shape for key, shape in shapes.items()}, name)
    return Network(arguments, {key: theirs[known[key]].float() for key in shapes})


def _renamed(weights: Weights, modules: Pairs, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{theirs}": weights[key] for key, theirs in names(weights, modules).items()}


def _under(weights: Weights, prefix: str, otherwise: str) -> dict[str, Tensor]:
    if not (found := below(weights, prefix)):
        raise ValueError(f"{otherwise}, expected {prefix}*")
    return found


def _shortest(value: Tensor) -> float:
    """Return the number of the fewest digits that is ``value`` in float32: 0.18215, not 0.18215000331."""
    return float(str(np.float32(value.item())))


def _stored(factor: float, channels: int) -> Latents:
    """Return what is read back where ``factor`` is written in float32."""
    return of_factor(_shortest(torch.tensor(factor)), channels)
