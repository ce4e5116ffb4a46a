"""Encode pictures to latents: ``python -m ldm.encode --autoencoder RUN --shards PATTERN --out FOLDER``."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from jsonargparse import ArgumentParser
from tqdm import tqdm

from ldm import checkpoint as ckpt
from ldm.callbacks.wandb_logger import SamplesWandb
from ldm.cli import check_at_least, command_parser, default_device, device, run_command
from ldm.data.decode import EXTENSIONS, IMAGES, LATENT, BadSample, decode
from ldm.data.files import ShardFiles
from ldm.data.index import Summary, summarize_all
from ldm.data.tar import expand
from ldm.latent_shards import MANIFEST, read_manifest
from ldm.lineage import publish_latents, run_of
from ldm.pictures import from_bytes
from ldm.run import Run, WandB, start_wandb, write_text
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage

HELP = """Encode the pictures of shards to latents, so that training a diffusion stage need not.

  python -m ldm.encode --autoencoder runs/demo/autoencoder \\
    --shards "shards/shapes/train-{000000..000019}.tar" --out shards/shapes-latents

Each shard of --shards becomes one of the same name in --out, with all other members as they are and
latent.npy instead of the picture: float16 (2C, h, w), mean and standard deviation of q(z | picture).
latents.json beside them says which autoencoder made them; ldm.fit refuses latents of another one. A call
that was interrupted is repeated: shards that are done are left alone."""


@dataclass(frozen=True)
class Encoder:
    """An autoencoder, and how to use it.

    Args:
        stage: The trained autoencoder.
        image_size: Side of the pictures that it encodes, in pixels.
        batch_size: Pictures encoded at once.
        keep_images: Whether the new shards keep the pictures.
    """

    stage: Autoencoder
    image_size: int
    batch_size: int
    keep_images: bool

    @torch.no_grad()
    def latents(self, images: list[torch.Tensor]) -> np.ndarray:
        """Encode B pictures (3, S, S) uint8 to (B, 2C, h, w) float16: mean and standard deviation."""
        posterior = self.stage.net.encode(from_bytes(torch.stack(images).to(self.stage.device)))
        return torch.cat([posterior.mean, posterior.std], dim=1).half().cpu().numpy()


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.encode", HELP)
    parser.add_argument(
        "--autoencoder", type=str, required=True, help="Run folder or .ckpt of an autoencoder."
    )
    parser.add_argument(
        "--shards", type=str, required=True, help="Shards to encode: a path with braces or a glob."
    )
    parser.add_argument("--out", type=str, required=True, help="Folder for the shards of latents.")
    parser.add_argument(
        "--index-dir",
        type=str | None,
        help="Folder for the indices of --shards; default: beside them, which must be writable then.",
    )
    parser.add_argument("--keep-images", action="store_true", help="Keep the pictures beside the latents.")
    parser.add_argument(
        "--size", type=int | None, help="Side of the pictures in pixels; default: as trained."
    )
    parser.add_argument("--batch-size", type=int, default=256, help="Pictures encoded at once.")
    parser.add_argument(
        "--wandb", type=WandB, default=WandB(), help="Weights & Biases, used for artifacts only."
    )
    parser.add_argument("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")
    return parser


def encode(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    command = parser()
    options = command.instantiate(command.parse_args(arguments))
    check_at_least("--batch-size", options.batch_size, 1)
    stage = load_stage(options.autoencoder, Autoencoder).to(device(options.device))
    size = int(options.size or stage.image_size or 0)
    check_at_least("--size", size, stage.net.factor)
    if size % stage.net.factor:
        raise ValueError(f"--size: {size} is not a multiple of the autoencoder's factor {stage.net.factor}")
    encoder = Encoder(stage, size, options.batch_size, options.keep_images)
    source = {"checkpoint": options.autoencoder, "sha256": ckpt.sha256(options.autoencoder)}
    made_by = {"autoencoder": source, "image_size": size, "keep_images": options.keep_images}
    paths = expand(options.shards, "--shards")
    tracked = _tracked(options.out, options.wandb, made_by)
    done, skipped = encode_shards(encoder, paths, Path(options.out), made_by, options.index_dir)
    for logger in tracked:
        publish_latents(logger, Path(options.out), made_by)
    print(f"{options.out}: {done} samples" + (f", {skipped} bad ones skipped" if skipped else ""))


def _tracked(out: str, wandb: WandB, made_by: dict[str, Any]) -> list[SamplesWandb]:
    """Begin a W&B run in the autoencoder's chain, if artifacts are wanted."""
    if not wandb.artifacts or wandb.mode == "disabled":
        return []
    chain = run_of(made_by["autoencoder"]["checkpoint"]).chain
    logger = Run(out).wandb(wandb, "encode", chain)
    start_wandb(logger, made_by)
    return [logger]


def encode_shards(
    encoder: Encoder, paths: list[str], out: Path, made_by: dict[str, Any], index_dir: str | None = None
) -> tuple[int, int]:
    """Encode the shards that are not done yet.

    Args:
        encoder: What encodes.
        paths: Shards with pictures.
        out: Folder for the new shards and their manifest.
        made_by: What the manifest says of the autoencoder.
        index_dir: Folder for the indices of ``paths``; None: beside each.

    Returns:
        Number of samples in the new shards, and of bad samples left out.

    Raises:
        ValueError: If ``out`` holds shards made otherwise, or two shards have the same name.
    """
    _check_names(paths)
    manifest = _begin(out, made_by)
    files = ShardFiles(summarize_all(paths, index_dir), index_dir)
    total = sum(summary.count for summary in files.summaries)
    with tqdm(total=total, desc="encode", unit=" pictures") as bar:
        for number, summary in enumerate(files.summaries):
            name = Path(summary.path).name
            if not _is_done(manifest["shards"].get(name), summary, out / name):
                manifest["shards"][name] = _encode_shard(encoder, files, number, out / name, bar)
                _write_manifest(out, manifest)
            else:
                bar.update(summary.count)
    entries = [manifest["shards"][Path(path).name] for path in paths]
    return sum(e["samples"] for e in entries), sum(len(e["skipped"]) for e in entries)


def _encode_shard(
    encoder: Encoder, files: ShardFiles, number: int, target: Path, bar: tqdm[Any]
) -> dict[str, Any]:
    """Write one shard, atomically, and return its entry in the manifest."""
    summary, count = files.summaries[number], 0
    skipped: list[str] = []
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    for stale in target.parent.glob(f".{target.name}.tmp-*"):
        stale.unlink()  # of a call that was killed
    try:
        with webdataset.TarWriter(str(temporary), encoder=False, mtime=0) as writer:
            for rows in _batches(range(summary.count), encoder.batch_size):
                good, bad = _encode_rows(encoder, files, number, rows)
                for sample in good:
                    writer.write(sample)
                count, skipped = count + len(good), skipped + bad
                bar.update(len(rows))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return {"size": summary.size, "mtime_ns": summary.mtime_ns, "samples": count, "skipped": skipped}


def _encode_rows(
    encoder: Encoder, files: ShardFiles, number: int, rows: range
) -> tuple[list[dict[str, Any]], list[str]]:
    """Encode a batch: the members of the new samples, and what is wrong with bad ones."""
    samples, images, bad = [], [], []
    for row in rows:
        members, origin = files.members(number, row, EXTENSIONS)
        try:
            images.append(decode(members, origin, ["image"], encoder.image_size, None)["image"])
        except BadSample as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            bad.append(str(error))
            continue
        dropped = (LATENT,) if encoder.keep_images else (LATENT, *IMAGES)
        samples.append({"__key__": origin.key, **{k: v for k, v in members.items() if k not in dropped}})
    for sample, latent in zip(samples, encoder.latents(images) if images else [], strict=True):
        sample[LATENT] = _npy(latent)
    return samples, bad


def _begin(out: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """Read the manifest of an earlier call, or begin one."""
    manifest = read_manifest(out) or {**made_by, "shards": {}}
    then, now = manifest["autoencoder"]["sha256"], made_by["autoencoder"]["sha256"]
    if then != now:
        raise ValueError(
            f"--out: '{out}' holds latents of another autoencoder (SHA-256 {then[:12]}..., expected "
            f"{now[:12]}...): choose another folder, or delete this one"
        )
    for name in ("image_size", "keep_images"):
        if manifest[name] != made_by[name]:
            raise ValueError(
                f"--out: '{out}' was encoded with {name} {manifest[name]}, expected {made_by[name]}: choose "
                "another folder, or delete this one"
            )
    if not manifest["shards"] and (foreign := sorted(out.glob("*.tar"))):
        raise ValueError(f"--out: {foreign[0]} is there, expected a folder without other shards")
    out.mkdir(parents=True, exist_ok=True)
    _write_manifest(out, manifest)
    return manifest


def _is_done(entry: dict[str, Any] | None, summary: Summary, target: Path) -> bool:
    same = entry is not None and (entry["size"], entry["mtime_ns"]) == (summary.size, summary.mtime_ns)
    return same and target.exists()


def _write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _check_names(paths: list[str]) -> None:
    names = [Path(path).name for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"--shards: {sorted(twice)[0]} is there twice, expected different names: one --out each"
        )


def _batches(rows: range, size: int) -> Iterator[range]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: encode(arguments))


if __name__ == "__main__":
    sys.exit(main())
