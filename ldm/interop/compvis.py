"""Stable Diffusion as CompVis saved it: U-Net, autoencoder and text tower in one file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.interop import compvis_facts
from ldm.interop.checkpoints import open_exported
from ldm.interop.compvis_autoencoder import (
    METADATA,
    PREFIX,
    UNFOLDED,
    find_autoencoder,
    read_autoencoder,
    write_alone,
    write_autoencoder_weights,
)
from ldm.interop.compvis_keys import below, dotted, unet_modules
from ldm.interop.compvis_networks import network, renamed
from ldm.interop.compvis_shapes import unet_arguments, unet_widths
from ldm.interop.compvis_text import OPEN_CLIP, read_text, write_text_tower
from ldm.interop.files import record
from ldm.interop.model import Network, TextToImage
from ldm.interop.runs import read_autoencoder_run, read_run, write_autoencoder, write_run
from ldm.interop.schedules import betas, build, check_process, process, scheduler_config
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import read_metadata, read_weights, sha256, write_weights
from ldm.nets.unet import UNet

UNET, AVERAGED = "model.diffusion_model.", "model_ema.diffusion_model"
"""Prefixes of the names of weights."""
TAKEN = (UNET, "model_ema.", PREFIX, UNFOLDED, "cond_stage_model.")
"""Prefixes of all weights that are read or known to be of no use."""
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ImportOptions:
    """Facts that weights do not determine. None takes the file's metadata, or else the usual value.

    Args:
        weights: Averaged ones, or those that were trained; default: averaged ones where there are.
        prediction: What the U-Net predicts; default: as the file states, or else epsilon. 2.x at 768 pixels
            predicts velocity.
        num_heads: Heads of the U-Net at every level; default: 8 in 1.x, 64 channels each in 2.x.
        image_size: Side of the images that it was trained on; default: as the file states, or else 512.
        scaling_factor: Factor of the autoencoder's latents; default: as the file states, or else 0.18215.
        shift_factor: Subtracted from them before; default: as the file states, or else 0.
        only: Import the autoencoder alone, also of a model that is otherwise none of ours: XL, 3, FLUX.
    """

    weights: Literal["ema", "raw"] | None = None
    prediction: Literal["epsilon", "velocity", "sample"] | None = None
    num_heads: int | None = None
    image_size: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    only: Literal["autoencoder"] | None = None


def import_file(file: str | Path, out: str | Path, options: ImportOptions) -> tuple[Path, list[str]]:
    """Turn a file of Stable Diffusion 1.x or 2.x, or of its autoencoder alone, into run folders of ours.

    As from-diffusers. Facts that the file lacks are those of Stable Diffusion unless given here.

    Args:
        file: Weights with the names that CompVis gave them, .ckpt or .safetensors.
        out: Folder for the run folders autoencoder, text and diffusion; or the autoencoder's run folder.
        options: Facts that the weights do not determine.

    Returns:
        The run folder of the diffusion stage, or the autoencoder's; and what was guessed or left out.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, lacks a part, is of a kind that cannot be expressed here, or states
            other things than the options.
    """
    file, name = Path(file), str(file)
    weights, header = read_weights(file), read_metadata(file)
    source = {"program": "CompVis", "name": file.name, "sha256": sha256(file)}
    metadata, factors = json.loads(header.get(METADATA, "{}")), (options.scaling_factor, options.shift_factor)
    is_complete = any(key.startswith((UNET, AVERAGED, "cond_stage_model.")) for key in weights)
    if options.only or not is_complete:
        theirs = find_autoencoder(weights, name)
        vae, latents, guessed = read_autoencoder(weights, theirs, header, *factors, name)
        return write_autoencoder(vae, latents, out, source, metadata.get("image_size")), guessed
    compvis_facts.refuse_families(weights, name)
    unet, kind = _read_unet(weights, metadata.get("unet"), options, name)
    theirs = _under(weights, PREFIX, f"{name}: the file has no autoencoder")
    vae, latents, guessed = read_autoencoder(weights, theirs, header, *factors, f"{name} ({PREFIX}*)")
    text = read_text(weights, name)
    is_open_clip = any(key.startswith(OPEN_CLIP) for key in weights)
    config, more = compvis_facts.scheduler(
        weights, header, metadata.get("scheduler"), options.prediction, is_open_clip, name
    )
    size = options.image_size or metadata.get("image_size") or compvis_facts.image_size(header) or 512
    text = Network(metadata.get("text", text.arguments), text.weights)
    model = TextToImage(unet, vae, text, latents, check_process(process(config, name), name), size)
    model.check(dict.fromkeys(("unet", "autoencoder", "text"), name))
    notes = guessed + more + compvis_facts.left_out(weights, TAKEN)
    return write_run(model, out, {**source, "weights": kind}), notes


def export_file(run: str | Path, out: str | Path) -> Path:
    """Write a text-to-image run as a single file of weights with the names that CompVis gave them.

    An autoencoder alone becomes a file of encoder.* and decoder.*; metadata have the scale of its latents.

    Args:
        run: Checkpoint or run folder of a diffusion stage, or of an autoencoder.
        out: File to write, ending in .safetensors.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has parts that Stable Diffusion has not, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or out.exists():
        found = "is there already" if out.exists() else f"ends in '{out.suffix}'"
        raise ValueError(f"--out: '{out}' {found}, expected a new file that ends in .safetensors")
    checkpoint = open_exported(run)
    made_of = {"record": json.dumps(record(checkpoint))}
    if checkpoint.stage == "autoencoder":
        return _export_autoencoder(checkpoint, out, made_of)
    model = read_run(checkpoint)
    arguments = {
        **{name: getattr(model, name).arguments for name in ("unet", "autoencoder", "text")},
        "scheduler": scheduler_config(model.process),
        "image_size": model.image_size,
    }
    tensors = {
        **renamed(model.unet.weights, unet_modules(model.unet.arguments), UNET),
        **write_autoencoder_weights(model.autoencoder, model.latents),
        **write_text_tower(model.text),
        **_tables(model),
    }
    write_weights(out, tensors, {METADATA: json.dumps(arguments), **made_of})
    return out


def _export_autoencoder(checkpoint: Checkpoint, out: Path, made_of: dict[str, str]) -> Path:
    tensors, ours = write_alone(*read_autoencoder_run(checkpoint))
    ours["image_size"] = checkpoint.state.get("image_size")
    write_weights(out, tensors, {METADATA: json.dumps(ours), **made_of})
    return out


def _read_unet(
    weights: Weights, metadata: dict[str, Any] | None, options: ImportOptions, name: str
) -> tuple[Network, str]:
    """Read the U-Net; also return which of its weights."""
    found = {
        "raw": below(weights, UNET),
        "ema": {dotted(key): value for key, value in below(weights, AVERAGED).items()},
    }
    kinds = [kind for kind in ("ema", "raw") if found[kind]]
    if not kinds:
        compvis_facts.refuse_others(weights, name)
        raise ValueError(f"{name}: the file has no U-Net, expected {UNET}*")
    if (kind := options.weights or kinds[0]) not in kinds:
        lacking = {"ema": f"averaged weights ({AVERAGED}*)", "raw": f"weights but averaged ones ({UNET}*)"}
        raise ValueError(f"{name}: the file has no {lacking[kind]}, expected --weights {kinds[0]}")
    theirs = found[kind]
    arguments = metadata or unet_arguments(theirs, name)
    if options.num_heads is not None:
        arguments = {**arguments, "num_heads": options.num_heads}
    widths = unet_widths(theirs, name)

    def unet() -> nn.Module:
        return UNet(widths, **arguments)

    return network(theirs, unet, arguments, unet_modules(arguments), f"{name} ({UNET}*)"), kind


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


def _under(weights: Weights, prefix: str, otherwise: str) -> dict[str, Tensor]:
    if not (found := below(weights, prefix)):
        raise ValueError(f"{otherwise}, expected {prefix}*")
    return found
