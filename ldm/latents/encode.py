"""Shards of images to shards of latents: read by workers, encoded by the processes of a group."""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from webdataset import TarWriter

from ldm.compiler import InferenceCompiler
from ldm.data.bad_samples import SKIP, BadSamplePolicy, Tally
from ldm.data.buckets import AspectRatio, Size
from ldm.data.fields import FIELDS, FLIPPED_LATENT, LATENT, TEXT_EMBEDDING
from ldm.data.files import ShardFiles
from ldm.data.filters import Filter
from ldm.data.index import Summary, summarize_all
from ldm.data.kept import check_kept
from ldm.data.remote import shard_name
from ldm.data.rows import Rows
from ldm.data.writer import tar_writer
from ldm.distributed.group import Group, SingleProcess
from ldm.hardware import Inference, inference
from ldm.io.atomic import MARK
from ldm.io.images import from_bytes
from ldm.latents.items import EncodingBatch, EncodingDataset, EncodingItem, batches, collate, num_batches
from ldm.latents.manifest import merge_notes, note_shard, open_manifest
from ldm.latents.text import EncodesText, embeddings
from ldm.nets.autoencoder import DiagonalGaussian, KLAutoencoder
from ldm.types import RGB8, ImageKind


@dataclass(frozen=True)
class ShardEncoder:
    """An autoencoder, and how to use it.

    Args:
        net: The trained autoencoder.
        device: Where it is.
        image_size: Side of the images that it encodes, in pixels.
        batch_size: Images encoded at once.
        num_workers: Processes that read and decode images; 0: this one does.
        keep_images: Whether the new shards keep the images.
        flip: Whether they also get the latents of the flipped images.
        precision: What it computes in.
        text: Text encoder whose tokens of the captions are stored too, or None.
        buckets: Sizes that images get by their proportions, from the widest to the highest; none: all are
            squares of ``image_size``.
        bad_samples: What becomes of samples that cannot be used; it is per process.
        kind: Channels and bits of the images.
        compiler: What compiles the autoencoder, or does not.
    """

    net: KLAutoencoder
    device: torch.device
    image_size: int
    batch_size: int
    num_workers: int
    keep_images: bool
    precision: Inference = "32"
    flip: bool = False
    text: EncodesText | None = None
    buckets: tuple[Size, ...] = ()
    bad_samples: BadSamplePolicy = SKIP
    kind: ImageKind = RGB8
    compiler: InferenceCompiler = field(default_factory=InferenceCompiler)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of the images that it encodes."""
        return self.buckets or (Size(self.image_size, self.image_size),)

    def members(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode stored images (B, C, H, W) to the members that the new samples get, (B, 2C, h, w) each.

        On a GPU nothing waits: they are computed when they are read.
        """
        images = images.to(self.device, non_blocking=True)
        with self.compiler.batch(len(images)):
            flipped = {FLIPPED_LATENT: self.latents(images.flip(-1))} if self.flip else {}
            return {LATENT: self.latents(images), **flipped}

    @torch.no_grad()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, C, H, W) that are on the device to (B, 2C, h, w) float16: mean, deviation."""
        with inference(self.precision, self.device):
            found = self.net.encode(from_bytes(images))
        posterior = DiagonalGaussian(found.mean.float(), found.log_var.float())
        return torch.cat([posterior.mean, posterior.std], dim=1).half()


def encode_shards(
    encoder: ShardEncoder,
    paths: list[str],
    out: Path,
    made_by: dict[str, Any],
    index_dir: str | None = None,
    group: Group = SingleProcess(),  # noqa: B008  (stateless)
    kept: Filter | None = None,
) -> tuple[int, int]:
    """Encode the shards that are not done yet, on all processes of a group.

    Args:
        encoder: The encoder.
        paths: Shards with images.
        out: Folder for the new shards and their manifest.
        made_by: The manifest's entry for the autoencoder.
        index_dir: Folder for the indices of ``paths``; None: that of each shard.
        group: The processes that the shards are distributed over.
        kept: Filter of the samples; None encodes all.

    Returns:
        Number of samples in the new shards, and of bad samples left out.

    Raises:
        ValueError: If ``out`` holds shards made otherwise, two shards have the same name, or the filter keeps
            nothing.
    """
    _check_names(paths)
    is_first = group.rank == 0
    made_by = made_by if kept is None else {**made_by, "filter": kept.identity}
    made_by = {**made_by, "buckets": [list(size) for size in encoder.buckets]} if encoder.buckets else made_by
    grouping = AspectRatio(encoder.sizes, kept=kept) if encoder.buckets else kept
    files = ShardFiles(group.broadcast(summarize_all(paths, index_dir) if is_first else []), index_dir)
    rows = group.broadcast(Rows(files.summaries, index_dir, grouping) if is_first else Rows([], index_dir))
    if kept is not None:
        check_kept(rows, kept)
    manifest = group.broadcast(open_manifest(out, made_by) if is_first else {})
    todo = [n for n, summary in enumerate(files.summaries) if not _is_done(manifest, summary, out)]
    of_rank = todo[group.rank :: group.world]
    total = int(rows.counts[of_rank].sum())
    full, num_passes = min(encoder.batch_size, int(rows.counts.max())), total * (1 + encoder.flip)
    encoder.compiler.begin(encoder.net.blocks(), encoder.device, num_passes, full, is_first)
    with tqdm(total=total, desc="encode", unit=" images", disable=not (is_first and total)) as bar:
        for name, entry in _encode(encoder, files, rows, of_rank, out, bar):
            note_shard(out, name, entry)
    group.all_reduce(torch.zeros(1))  # all are done
    entries = group.broadcast(merge_notes(out, manifest) if is_first else manifest)["shards"]
    named = [entries[shard_name(path)] for path in paths]
    return sum(e["samples"] for e in named), sum(len(e["skipped"]) for e in named)


def _encode(
    encoder: ShardEncoder, files: ShardFiles, rows: Rows, numbers: list[int], out: Path, bar: tqdm[Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Encode some of the shards; yield the name and the manifest's entry of each that is done."""
    places = [batches(n, rows, encoder.batch_size) for n in numbers]
    items = iter(
        DataLoader(
            EncodingDataset(files, encoder.sizes, encoder.text is not None, encoder.kind),
            batch_sampler=chain.from_iterable(places),
            num_workers=encoder.num_workers,
            collate_fn=collate,
            pin_memory=encoder.device.type == "cuda",
        )
    )
    tally = Tally(encoder.bad_samples, "--bad-samples")
    for number in numbers:
        summary = files.summaries[number]
        of_shard = islice(items, num_batches(number, rows, encoder.batch_size))
        target = out / shard_name(summary.path)
        count, skipped = _encode_shard(encoder, of_shard, target, bar, tally)
        about: dict[str, Any] = {
            "size": summary.size,
            "mtime_ns": summary.mtime_ns,
            "samples": count,
            "skipped": skipped,
        }
        if encoder.buckets:
            counts = zip(encoder.buckets, rows.counts[number].tolist(), strict=True)
            about |= {"buckets": {str(size): num for size, num in counts if num}}
        yield target.name, about


def _encode_shard(
    encoder: ShardEncoder, batches: Iterable[EncodingBatch], target: Path, bar: tqdm[Any], tally: Tally
) -> tuple[int, list[str]]:
    """Write one shard, atomically; return its number of samples, and what was wrong with others."""
    count = 0
    skipped: list[str] = []
    for stale in target.parent.glob(f"{target.name}{MARK}*"):
        stale.unlink()  # of a call that was killed
    with tar_writer(target) as writer, ThreadPoolExecutor(1) as thread:  # writes while the next is encoded
        writing: deque[Future[None]] = deque()
        for items, images in batches:
            stored = _stored(encoder, items, images)
            writing.append(thread.submit(_write, writer, items, stored, encoder.keep_images))
            if len(writing) > 2:
                writing.popleft().result()
            bad = [item.bad for item in items if item.bad is not None]
            for message in bad:
                tqdm.write(f"skipped: {message}", file=sys.stderr)
            tally.count(len(items), bad)
            count, skipped = count + len(items) - len(bad), skipped + bad
            bar.update(len(items))
        for each in writing:
            each.result()
    return count, skipped


def _stored(
    encoder: ShardEncoder, items: list[EncodingItem], images: torch.Tensor | None
) -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """Compute the members that the new samples get, each with the values of the good ones."""
    found: dict[str, Any] = {} if images is None else encoder.members(images)
    if encoder.text is not None:
        texts = [item.texts for item in items if item.bad is None]
        found[TEXT_EMBEDDING] = list(embeddings(encoder.text, texts, encoder.batch_size))
    return found


def _write(
    writer: TarWriter,
    items: list[EncodingItem],
    stored: dict[str, torch.Tensor | list[torch.Tensor]],
    keep_images: bool,
) -> None:
    """Write the new samples: those of the good items, with what is stored by member."""
    good = [item for item in items if item.bad is None]
    replaced = (*FIELDS["latent"].read(None), TEXT_EMBEDDING)
    dropped = replaced if keep_images else (*replaced, *FIELDS["image"].members)
    arrays: dict[str, Any] = {
        name: values.cpu().numpy() if isinstance(values, torch.Tensor) else [v.cpu().numpy() for v in values]
        for name, values in stored.items()
    }
    for row, item in enumerate(good):
        kept = {name: member for name, member in item.members.items() if name not in dropped}
        new = {name: _npy(of_all[row]) for name, of_all in arrays.items()}
        writer.write({"__key__": item.key, **kept, **new})


def _is_done(manifest: dict[str, Any], summary: Summary, out: Path) -> bool:
    name = shard_name(summary.path)
    entry = manifest["shards"].get(name)
    same = entry is not None and (entry["size"], entry["mtime_ns"]) == (summary.size, summary.mtime_ns)
    return same and (out / name).exists()


def _check_names(paths: list[str]) -> None:
    names = [shard_name(path) for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"--shards: {sorted(twice)[0]} is there twice, expected different names: one --out each"
        )


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
