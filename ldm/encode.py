"""Encode images to latents: ``python -m ldm.encode --autoencoder RUN --shards PATTERN --out FOLDER``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ldm.cli import check_multiple, command_parser, default_device, run_command
from ldm.compiler import COMPILE_HELP, Compiled, InferenceCompiler
from ldm.conditioners.huggingface import DType, HFText, Layer
from ldm.data.bad_samples import SKIP, BadSamplePolicy
from ldm.data.buckets import Buckets
from ldm.data.filters import Filter
from ldm.data.tar import expand
from ldm.distributed.launch import processes
from ldm.hardware import (
    Inference,
    check_shared_memory,
    decoding_workers,
    explaining_memory,
    inference_precision,
    warn_of_emulation,
)
from ldm.io.checkpoint import Checkpoint
from ldm.io.lock import held
from ldm.io.pins import pinned, pins
from ldm.io.stderr import plain_warnings
from ldm.latents.encode import ShardEncoder, encode_shards
from ldm.latents.space import encoder_sha256, latent_scale
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.artifacts import publish_latents, run_of
from ldm.runs.folder import RunFolder, WandB
from ldm.runs.tracking import tracking
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage
from ldm.types import RGB8

HELP = """Encode the images of shards to latents, so that training a diffusion stage need not.

  python -m ldm.encode --autoencoder runs/demo/autoencoder \\
    --shards "shards/shapes/train-{000000..000019}.tar" --out shards/shapes-latents

Each shard of --shards becomes one of the same name in --out, with all other members as they are and
latent.npy instead of the image: float16 (2C, h, w), mean and standard deviation of q(z | image). With --text
a text.npy holds the tokens of its captions, float16 (captions, n, D), for models conditioned on HFText.
latents.json beside them says which autoencoder made them; ldm.fit refuses latents of another one. A call
that was interrupted is repeated: shards that are done are left alone. --buckets.multiple 64 encodes images
of all shapes as they are, nearly (data/README.md), and not their central squares. Several processes share
the shards:

  torchrun --nproc-per-node 8 -m ldm.encode ..."""


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.encode", HELP)
    parser.add_argument(
        "--autoencoder", type=str, required=True, help="Run folder, .ckpt or wandb:... of an autoencoder."
    )
    parser.add_argument(
        "--shards", type=str, required=True, help="Shards to encode: a path with braces or a glob."
    )
    parser.add_argument("--out", type=str, required=True, help="Folder for the shards of latents.")
    parser.add_argument(
        "--index-dir",
        type=str | None,
        help="Folder for the indices of --shards; default: that of the shards, which must be writable then.",
    )
    _add_text(parser)
    parser.add_argument(
        "--filter",
        type=str | None,
        help="Samples to encode, by an expression about their size, caption_length and keys of their json, "
        "e.g. 'min(width, height) >= 256 and aesthetic > 5' (data/README.md); default: all.",
    )
    _add_images(parser)
    parser.add_argument(
        "--bad-samples",
        type=BadSamplePolicy,
        default=SKIP,
        help="What becomes of samples that cannot be used: --bad-samples.action error, .max_share 0.01.",
    )
    _add_machine(parser)
    parser.add_argument(
        "--wandb", type=WandB, default=WandB(), help="Weights & Biases, used for artifacts only."
    )
    return parser


def _add_machine(parser: ArgumentParser) -> None:
    """Add options of how the machine computes."""
    parser.add_argument(
        "--batch-size", type=PositiveInt, default=256, help="Images encoded at once, by each process."
    )
    parser.add_argument(
        "--num-workers",
        type=NonNegativeInt | None,
        help="Further processes that read and decode, for each one; default: on a GPU all cores, else none.",
    )
    parser.add_argument(
        "--precision",
        type=Inference,
        default="auto",
        help="What the autoencoder computes in; auto: bf16 on a GPU that has it, else 32.",
    )
    parser.add_argument("--compile", type=Compiled, default="auto", help=COMPILE_HELP)
    parser.add_argument("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")


def _add_images(parser: ArgumentParser) -> None:
    """Add options of what is made of the images."""
    parser.add_argument("--keep-images", action="store_true", help="Keep the images with the latents.")
    parser.add_argument(
        "--flip",
        action="store_true",
        help="Also store the latent of each image with left and right exchanged, latent.flip.npy, for "
        "data.augment.flip.",
    )
    parser.add_argument(
        "--size", type=PositiveInt | None, help="Side of the images in pixels; default: as trained."
    )
    parser.add_argument(
        "--buckets",
        type=Buckets | None,
        help="Encode images in sizes of about their proportions, in place of squares: --buckets.multiple 64.",
    )


def _add_text(parser: ArgumentParser) -> None:
    """Add what captions are encoded by."""
    add, of = parser.add_argument, signature(HFText).parameters
    add(
        "--text",
        type=str | None,
        help="Folder of a text encoder of transformers: its tokens of the captions are stored too.",
    )
    add("--text-length", type=PositiveInt, default=of["max_length"].default, help="Most tokens of a caption.")
    add("--text-layer", type=Layer, default=of["layer"].default, help="Whose hidden states are stored.")
    add("--text-dtype", type=DType, default=of["dtype"].default, help="What the text encoder computes in.")


@explaining_memory("a smaller --batch-size", "--precision bf16", "--device cpu")
def encode(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    command = parser()
    options = command.instantiate(command.parse_args(arguments))
    with processes(options.device) as (group, where), ExitStack() as scope:
        options = pinned(options, group.broadcast(pins(options) if group.rank == 0 else {}))
        checkpoint = Checkpoint.open(options.autoencoder, Autoencoder.name)
        text = load_text(options, where)
        encoder = load_encoder(checkpoint, options, where)
        encoder = encoder if text is None else replace(encoder, text=text.encoder.module)
        source = {
            "checkpoint": options.autoencoder,
            "sha256": checkpoint.sha256,
            "encoder_sha256": encoder_sha256(checkpoint),
        }
        made_by = {
            "autoencoder": source,
            "image_size": encoder.image_size,
            "keep_images": encoder.keep_images,
            "flip": encoder.flip,
            **({} if encoder.kind == RGB8 else {"image": asdict(encoder.kind)}),
        }
        if group.rank == 0:
            scope.enter_context(held(Path(options.out), "--out"))
        kept = None if options.filter is None else Filter(options.filter, "--filter")
        stored = made_by if text is None else {**made_by, "text": about_text(text, options.text)}
        paths = expand(options.shards, "--shards")
        tracked = _tracked(options.out, options.wandb, made_by) if group.rank == 0 else []
        with tracking(tracked, made_by, options.wandb.finish_timeout, lambda: False):
            out = Path(options.out)
            done, skipped = encode_shards(encoder, paths, out, stored, options.index_dir, group, kept)
            for logger in tracked:
                publish_latents(logger, out, made_by)
    if group.rank == 0:
        print(f"{options.out}: {done} samples" + (f", {skipped} bad ones skipped" if skipped else ""))


def load_encoder(checkpoint: Checkpoint, options: Namespace, where: torch.device) -> ShardEncoder:
    """Load the autoencoder.

    Raises:
        ValueError: If it cannot encode images of the requested size, or if its latents have no scale.
    """
    latent_scale(checkpoint)  # what diffusion will need
    stage = load_stage(checkpoint, Autoencoder).to(where)
    size = int(options.size or stage.image_size or 0)
    check_multiple("--size", size, stage.net.factor)
    if where.type == "cuda":
        stage.to(memory_format=torch.channels_last)
    buckets = tuple(options.buckets.sizes(size)) if options.buckets else ()
    for side in {side for found in buckets for side in found}:
        check_multiple("--buckets.multiple: a side of a bucket", side, stage.net.factor)
    pixels = max((height * width for height, width in buckets), default=size * size)
    kind = stage.image_kind or RGB8
    workers, batch_bytes = options.num_workers, options.batch_size * kind.pixel_bytes * pixels
    if workers is None:
        workers = decoding_workers(where, batch_bytes)
    check_shared_memory("--num-workers", workers, batch_bytes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    precision = inference_precision(options.precision, where)
    if warning := warn_of_emulation("--precision", precision, where):
        print(warning, file=sys.stderr)
    return ShardEncoder(
        stage.net,
        where,
        size,
        options.batch_size,
        workers,
        options.keep_images,
        options.precision,
        options.flip,
        buckets=buckets,
        bad_samples=options.bad_samples,
        kind=kind,
        compiler=InferenceCompiler(options.compile),
    )


def load_text(options: Namespace, where: torch.device) -> HFText | None:
    """Load the text encoder, if captions are to be encoded.

    Raises:
        ValueError: If its folder lacks something.
    """
    if options.text is None:
        return None
    layer, dtype = options.text_layer, options.text_dtype
    return HFText(options.text, options.text_length, layer=layer, dtype=dtype).to(where)


def about_text(text: HFText, folder: str) -> dict[str, Any]:
    """Make the manifest's entry for the text encoder: what decides its tokens, and the null condition's."""
    null = text.encoder.module.null.half().tolist()
    return {"folder": folder, **text.text_encoder, "null": null}


def _tracked(out: str, wandb: WandB, made_by: dict[str, Any]) -> list[WandbSamplesLogger]:
    """Make a W&B run in the autoencoder's chain, if artifacts are wanted."""
    if not wandb.artifacts or wandb.mode == "disabled":
        return []
    chain = run_of(made_by["autoencoder"]["checkpoint"]).chain
    return [RunFolder(out).wandb(wandb, "encode", chain)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    with plain_warnings():
        return run_command(lambda: encode(arguments))


if __name__ == "__main__":
    sys.exit(main())
