"""Diffusion transformers as facebookresearch/DiT saves them: one file, without autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.schedule import Linear
from ldm.interop.checkpoints import open_exported, write_checkpoint
from ldm.interop.dit_keys import from_facebook, num_blocks, to_facebook
from ldm.interop.dit_model import ImageTransformer, check_graph, is_transformer, read_transformer, stage_of
from ldm.interop.model import Network, Process
from ldm.interop.runs import read_autoencoder_run
from ldm.interop.schedules import named
from ldm.io.atomic import replacing
from ldm.io.checkpoint import Checkpoint
from ldm.io.upstream import keep_upstream
from ldm.io.weights import read_weights, sha256
from ldm.nets.autoencoder import downsampling

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, in the sizes of the paper: S, B, L and XL."""
PARTS = {"ema": "ema", "raw": "model"}
"""Names in a checkpoint of their training, by --weights."""


def import_dit(
    file: str | Path,
    autoencoder: str | Path,
    out: str | Path,
    heads: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
) -> Path:
    """Turn a file of facebookresearch/DiT into the run folder of a diffusion stage.

    Such a file has no autoencoder: name the run folder of the one that it was trained with, which
    ``from-diffusers --folder sd-vae-ft-ema`` makes.

    Args:
        file: Weights, e.g. DiT-XL-2-256x256.pt, or a checkpoint of their training.
        autoencoder: Run folder of the autoencoder.
        out: Run folder to write.
        heads: Attention heads; default: those of the size of the paper that is as wide.
        weights: Of a checkpoint of their training, averaged ones or those that were trained.

    Returns:
        The run folder.

    Raises:
        FileNotFoundError: If there is no file, or no autoencoder.
        ValueError: If it is damaged or something else, or the autoencoder does not fit.
    """
    name, found = str(file), read_weights(file, (PARTS[weights],))
    ours, table, grid = from_facebook(found, name)
    vae = Checkpoint.open(autoencoder, "autoencoder")
    network, latents = read_autoencoder_run(vae)
    size = found["x_embedder.proj.weight"].shape[2]
    arguments = {
        "patch_size": size,
        "hidden": table.shape[1],
        "depth": num_blocks(found, "blocks."),
        "heads": heads or _heads(table.shape[1], name),
        "options": {},
        "position_grid": None,
    }
    process = Process(named(Linear), named(Epsilon), named(DDPM, num_steps=250))
    image_size = grid * size * downsampling(network.arguments["block_out_channels"])
    dit = Network(arguments, ours)
    model = ImageTransformer(dit, network, latents, process, image_size, table).check(name)
    config, tensors = stage_of(model, str(autoencoder), "")
    source = {"program": "facebookresearch/DiT", "name": Path(file).name, "sha256": sha256(file)}
    built_on = {str(autoencoder): vae.sha256}
    write_checkpoint(out, "diffusion", config, tensors, source, image_size, built_on)
    keep_upstream(Path(out), built_on)
    return Path(out)


def export_dit(run: str | Path, out: str | Path) -> Path:
    """Write a class-conditional transformer as a file that facebookresearch/DiT reads.

    Args:
        run: Checkpoint or run folder of a diffusion stage with a DiT and class labels.
        out: File to write, ending in .pt.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has parts that their program has not, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix != ".pt" or out.exists():
        found = "is there already" if out.exists() else f"ends in '{out.suffix}'"
        raise ValueError(f"--out: '{out}' {found}, expected a new file that ends in .pt")
    checkpoint = open_exported(run)
    if not is_transformer(checkpoint):
        raise ValueError(f"checkpoint '{checkpoint.file}' has no DiT as model.denoiser, which to-dit writes")
    model = read_transformer(checkpoint)
    check_graph(model, single=False, as_diffusers=False, where="facebookresearch/DiT")
    if model.table is None or model.grid is None:
        raise ValueError("model.conditioner: expected ClassLabel, and a run that was trained, for to-dit")
    _save(to_facebook(model.dit.weights, model.table, model.grid), out)
    return out


def _heads(hidden: int, name: str) -> int:
    if hidden not in HEADS:
        raise ValueError(f"{name}: the width {hidden} is of no size of the paper: say --heads")
    return HEADS[hidden]


def _save(tensors: Mapping[str, Tensor], out: Path) -> None:
    with replacing(out) as temporary:
        torch.save(dict(tensors), temporary)
