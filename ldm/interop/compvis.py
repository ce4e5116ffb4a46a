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

from ldm.interop import compvis_facts
from ldm.interop.compvis_keys import Pairs, autoencoder_modules, below, dotted, names, unet_modules
from ldm.interop.compvis_shapes import autoencoder_arguments, unet_arguments, unet_widths
from ldm.interop.compvis_text import OPEN_CLIP, read_text, write_text_tower
from ldm.interop.files import record
from ldm.interop.latents import complete, fold, of_factor, originals, scaling_factor, unfold
from ldm.interop.model import Latents, Network, TextToImage
from ldm.interop.runs import read_run, write_autoencoder, write_run
from ldm.interop.schedules import betas, build, check_process, process, scheduler_config
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import check, read_metadata, read_weights, sha256, write_weights
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet

UNET, AVERAGED, AUTOENCODER = "model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model."
"""How the names of weights begin."""
UNFOLDED = "ldm_latents."
"""The same of ours, see ``latents.originals``."""
TAKEN = (UNET, "model_ema.", AUTOENCODER, UNFOLDED, "cond_stage_model.")
"""How the names of all weights begin that are read or known to be of no use."""
SCALE = 0.18215
"""Scaling factor of Stable Diffusion's latents."""
SCALE_GUESSED = (
    f"the file has no scale of its latents: assumed to be Stable Diffusion's, {SCALE}; for another one say "
    "--scaling-factor"
)
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""The same of an autoencoder in a file of its own."""
METADATA = "ldm"
"""Key of our files' metadata: arguments that weights do not determine."""
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ImportOptions:
    """Facts that weights do not determine. None takes the file's metadata, or else the usual value.

    Args:
        weights: Averaged ones, or those that were trained; default: averaged ones where there are.
        prediction: What the U-Net predicts; default: as the file says, or else epsilon. 2.x at 768 pixels
            predicts velocity.
        num_heads: Heads of the U-Net at every level; default: 8 in 1.x, 64 channels each in 2.x.
        image_size: Side of the images that it was trained on; default: as the file says, or else 512.
        scaling_factor: What multiplies the autoencoder's latents; default: as the file says, or else 0.18215.
    """

    weights: Literal["ema", "raw"] | None = None
    prediction: Literal["epsilon", "velocity", "sample"] | None = None
    num_heads: int | None = None
    image_size: int | None = None
    scaling_factor: float | None = None


def import_file(file: str | Path, out: str | Path, options: ImportOptions) -> tuple[Path, list[str]]:
    """Turn a file of Stable Diffusion 1.x or 2.x, or of its autoencoder alone, into run folders of ours.

    As from-diffusers. What the file does not say is as in Stable Diffusion unless given here.

    Args:
        file: Weights with the names that CompVis gave them, .ckpt or .safetensors.
        out: Folder for the run folders autoencoder, text and diffusion; or the autoencoder's run folder.
        options: Facts that the weights do not determine.

    Returns:
        The run folder of the diffusion stage, or the autoencoder's; and what was guessed or left out.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, lacks a part, is of a kind that cannot be expressed here, or says other
            things than the options.
    """
    file, name = Path(file), str(file)
    weights, header = read_weights(file), read_metadata(file)
    source = {"program": "CompVis", "name": file.name, "sha256": sha256(file)}
    if not any(key.startswith((UNET, AVERAGED, "cond_stage_model.")) for key in weights):
        return _import_autoencoder(weights, out, options, name, source)
    metadata = json.loads(header.get(METADATA, "{}"))
    unet, kind = _read_unet(weights, metadata.get("unet"), options, name)
    theirs = _under(weights, AUTOENCODER, f"{name}: the file has no autoencoder")
    autoencoder, latents, guessed = _read_autoencoder(
        weights, theirs, metadata.get("autoencoder"), options, f"{name} ({AUTOENCODER}*)"
    )
    text = read_text(weights, name)
    is_open_clip = any(key.startswith(OPEN_CLIP) for key in weights)
    config, more = compvis_facts.scheduler(
        weights, header, metadata.get("scheduler"), options.prediction, is_open_clip, name
    )
    size = options.image_size or metadata.get("image_size") or compvis_facts.image_size(header) or 512
    text = Network(metadata.get("text", text.arguments), text.weights)
    model = TextToImage(unet, autoencoder, text, latents, check_process(process(config, name), name), size)
    model.check(dict.fromkeys(("unet", "autoencoder", "text"), name))
    notes = guessed + more + compvis_facts.left_out(weights, TAKEN)
    return write_run(model, out, {**source, "weights": kind}), notes


def export_file(run: str | Path, out: str | Path) -> Path:
    """Write a text-to-image run as a single file of weights with the names that CompVis gave them.

    Args:
        run: Checkpoint or run folder of a diffusion stage.
        out: File to write, ending in .safetensors.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has parts that Stable Diffusion has not, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".safetensors" or out.exists():
        found = "is there already" if out.exists() else f"ends in '{out.suffix}'"
        raise ValueError(f"--out: '{out}' {found}, expected a new file that ends in .safetensors")
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
    write_weights(out, tensors, {METADATA: json.dumps(arguments), "record": json.dumps(metadata)})
    return out


def _import_autoencoder(
    weights: Weights, out: str | Path, options: ImportOptions, name: str, source: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """Import a file of an autoencoder alone; what trained it (loss.*) is left out."""
    theirs = below(weights, AUTOENCODER) or {k: v for k, v in weights.items() if k.startswith(PARTS)}
    if "encoder.conv_in.weight" not in theirs:
        compvis_facts.refuse_others(weights, name)
        raise ValueError(f"{name}: the file has no U-Net, expected {UNET}*, nor an autoencoder, encoder.*")
    autoencoder, latents, guessed = _read_autoencoder(weights, theirs, None, options, name)
    if guessed and len(latents.mean) != 4:
        raise ValueError(
            f"{name}: the file has no scale of its {len(latents.mean)} latent channels: say --scaling-factor"
        )
    return write_autoencoder(autoencoder, latents, out, source), guessed


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

    return _network(theirs, unet, arguments, unet_modules(arguments), f"{name} ({UNET}*)"), kind


def _read_autoencoder(
    weights: Weights, found: Weights, metadata: dict[str, Any] | None, options: ImportOptions, where: str
) -> tuple[Network, Latents, list[str]]:
    """Read the autoencoder; also note a guess of its scale."""
    # 1x1 convolutions there, matrices here
    theirs = {key: w.flatten(1) if ".attn_1." in key and w.ndim == 4 else w for key, w in found.items()}
    arguments = metadata or autoencoder_arguments(theirs, where)
    theirs = complete(theirs, arguments["latent_channels"])

    def autoencoder() -> nn.Module:
        return KLAutoencoder(**arguments)

    network = _network(theirs, autoencoder, arguments, autoencoder_modules(arguments), where)
    stated = _shortest(weights["scale_factor"]) if "scale_factor" in weights else None
    if stated is not None and options.scaling_factor not in (None, stated):
        raise ValueError(
            f"--scaling-factor: got {options.scaling_factor}, but {where} has {stated}: leave the option out"
        )
    factor = options.scaling_factor or stated or SCALE
    if unfolded := unfold(network.weights, below(weights, UNFOLDED)) if factor == 1.0 else None:
        return Network(arguments, unfolded[0]), unfolded[1], []
    notes = [SCALE_GUESSED] if options.scaling_factor is None and stated is None else []
    return network, of_factor(factor, arguments["latent_channels"]), notes


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
    """Return the number of the fewest digits that is ``value``: 0.18215, not 0.18215000331, nor its half."""
    if value.item() == torch.tensor(SCALE).to(value.dtype).item():
        return SCALE
    return float(str(np.float32(value.item())))


def _stored(factor: float, channels: int) -> Latents:
    """Return what is read back where ``factor`` is written in float32."""
    return of_factor(_shortest(torch.tensor(factor)), channels)
