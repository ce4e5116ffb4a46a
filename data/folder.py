"""Pack a folder of images with captions into tar shards: ``python -m data.folder``."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data.captions import WAYS, chosen, find
from data.items import Item, Skipped
from data.report import ALREADY, CLASSES, REPORT, SKIPPED, Report
from data.samples import Extras, ItemSamples, Sampling
from data.writing import is_complete, pack
from ldm.cli import run_command
from ldm.data.bad_samples import SKIP, BadSamplePolicy, Tally, TooManyBad
from ldm.io.atomic import write_text
from ldm.types import BITS, CHANNELS, ImageKind

HELP = """\
Pack a folder of images with captions into tar shards.

What the folder holds is found out:
  metadata.jsonl, .csv or .parquet, as for Hugging Face: columns file_name, relative to it, and text
  Parquet files with the bytes of images and a caption, as from Hugging Face or img2dataset
  .txt or .caption files next to the images (cat.jpg, cat.txt)
or --captions states it: "folders" takes the name of an image's folder (one per class, as ImageFolder) as
caption and class, "none" packs the images alone, and a table (CSV, TSV, JSONL or Parquet) has the columns
file (relative to the folder), caption and, if there are classes, label. The columns may also be called
file_name, image or path, and text or prompt; --columns names others.

Images are jpg, jpeg, png or webp; their bytes are kept unless --resize asks for smaller ones. TIFF becomes
PNG. --channels and --bits declare another kind than RGB of 8 bits (data.image): images that cannot become it
without a loss are skipped, and smaller ones keep both. What cannot be used is skipped, counted and listed in
skipped.txt: more than a tenth of 1,000 images or more ends it (--bad-samples.max_share), the first one with
--bad-samples.action error. --masks adds a random mask to each image, to train inpainting; --low-res N a copy
whose shorter side is N pixels, to train super-resolution.

A call that was interrupted goes on after its last shard when it is repeated. If the folder already holds the
same set, nothing is done. docs/own-images.md says how to go on."""


def pack_folder(
    source: Path,
    out: Path,
    captions: str = "auto",
    val_fraction: float = 0.05,
    resize: int | None = None,
    shard_size: int = 1000,
    extras: Extras | None = None,
    columns: Sequence[str] = (),
    workers: int = 1,
    bad_samples: BadSamplePolicy = SKIP,
    kind: ImageKind | None = None,
) -> tuple[bool, Skipped]:
    """Write train and val shards of a folder of images.

    Args:
        source: Folder of images, searched with its subfolders.
        out: Folder for the shards.
        captions: "txt" (x.txt next to x.jpg), "folders" (one per class), "none", "metadata" (of Hugging
            Face), "parquet" (images in Parquet files), "auto" (the one that fits), or a table.
        val_fraction: Fraction of the images for val-*.tar, in [0, 1), selected by a hash of their names.
        resize: Shorter side in pixels to which larger images are reduced; None keeps the files' bytes.
        shard_size: Samples per shard.
        extras: Members to condition on, made from each image; None makes none.
        columns: Columns of the table: file, caption and perhaps label; none takes the usual names.
        workers: Processes. The shards are the same for any number.
        bad_samples: What becomes of images that cannot be used.
        kind: Channels and bits of the images; None: RGB of 8 bits where they are resized.

    Returns:
        False if the shards were already there, and what was skipped.

    Raises:
        FileNotFoundError: If the folder or the table is missing.
        ValueError: If there are no images, the table lacks a column, the policy does not allow as many bad
            ones, or ``out`` holds other shards.
    """
    _check(source, val_fraction, {"--resize": resize, "--shard-size": shard_size, "--workers": workers})
    captions = chosen(source, captions, columns)
    if columns and (len(columns) not in (2, 3) or captions in ("txt", "folders")):
        raise ValueError(
            f"--columns: got {' '.join(columns)}, expected FILE CAPTION [LABEL] of a table of --captions"
        )
    sampling = Sampling(source, resize, extras or Extras(), columns, kind)
    skipped, tally = Skipped(), Tally(bad_samples, "--bad-samples")
    with _listed(out, skipped):
        found = find(source, captions, columns, skipped)
        tally.count(len(found.items) + len(skipped.bad), skipped.bad)
        splits = _split(found.items, val_fraction, source, skipped)
        settings = _settings(splits, sampling, val_fraction, shard_size)
        words = {"source": f"{len(found.items)} images of {source.name}, captions {Path(captions).name}"}
        report = Report(out)
        samples = {
            name: ItemSamples(sampling, items, workers, skipped, tally, report.add(name))
            for name, items in splits.items()
            if items
        }

        def finish() -> None:
            _write_about(out, skipped, found.classes, report)

        return pack(out, settings, samples, shard_size, len(found.items), words, finish), skipped


def _settings(
    splits: dict[str, list[Item]], sampling: Sampling, val_fraction: float, shard_size: int
) -> dict[str, Any]:
    """Return what decides the bytes of the shards."""
    return {
        "set": "folder",
        "version": 1,
        "val_fraction": val_fraction,
        "resize": sampling.resize,
        "shard_size": shard_size,
        "source": _fingerprint(splits["val"] + splits["train"], sampling.folder),
        "columns": [*sampling.columns] or None,
        "masks": sampling.extras.masks or None,
        "low_res": sampling.extras.low_res,
        "kind": None if sampling.kind is None else str(sampling.kind),
    }


@contextmanager
def _listed(out: Path, skipped: Skipped) -> Iterator[None]:
    """List what cannot be used beside the shards where there is too much of it, but for a set of before."""
    try:
        yield
    except TooManyBad as error:
        if is_complete(out):
            raise
        write_text(out / SKIPPED, skipped.listing())
        raise TooManyBad(f"{error}; all are in {out / SKIPPED}") from error


def _write_about(out: Path, skipped: Skipped, classes: Sequence[str], report: Report) -> None:
    write_text(out / SKIPPED, skipped.listing())
    if classes:
        write_text(out / CLASSES, "".join(f"{name}\n" for name in classes))
    write_text(out / REPORT, report.text(skipped))


def _check(source: Path, val_fraction: float, counts: dict[str, int | None]) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"--images: '{source}' is not a folder")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction: {val_fraction}, expected at least 0 and below 1")
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{option}: {count}, expected at least 1")


def _split(
    items: Sequence[Item], val_fraction: float, source: Path, skipped: Skipped
) -> dict[str, list[Item]]:
    """Split by a hash of the names. Files are shuffled by it too; rows stay in the order they are read in."""
    by_hash = sorted(items, key=lambda item: hashlib.sha256(item.name.encode()).digest())
    num_val = max(1, round(val_fraction * len(items))) if val_fraction else 0
    if num_val >= len(items):
        raise ValueError(
            f"{source}: {len(items)} usable images are too few for --val-fraction {val_fraction}"
            f"{', skipped ' if skipped else ''}{skipped.counts()}"
        )
    splits = {"train": by_hash[num_val:], "val": by_hash[:num_val]}
    if items[0].row is None:
        return splits
    return {name: sorted(found, key=lambda item: (item.file, item.row)) for name, found in splits.items()}


def _fingerprint(items: Sequence[Item], source: Path) -> str:
    """Hash the inputs of the shards: names, captions, labels, sizes and times of the files."""

    @cache
    def stat(file: str) -> tuple[int, int]:
        found = (source / file).stat()
        return found.st_size, found.st_mtime_ns

    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item, *stat(item.file))).encode())
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.folder", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    ways = ", ".join(f'"{way}"' for way in WAYS)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images, searched with its subfolders")
    add("--out", type=Path, required=True, help="folder for the shards; made if missing")
    add("--captions", default="auto", help=f'{ways}, a table, or "auto" (default): what the folder holds')
    add("--columns", nargs="+", default=(), metavar="NAME", help="the table's columns: FILE CAPTION [LABEL]")
    add("--val-fraction", type=float, default=0.05, metavar="X", help="fraction for val-*.tar (default 0.05)")
    add("--resize", type=int, metavar="N", help="reduce larger images to this shorter side in pixels")
    add("--shard-size", type=int, default=1000, metavar="N", help="samples per shard (default 1000)")
    add("--channels", type=int, choices=CHANNELS, help="channels of the images (default 3)")
    add("--bits", type=int, choices=BITS, help="bits of each channel (default 8)")
    add("--masks", action="store_true", help="add a random mask to each image (inpainting)")
    add("--low-res", type=int, metavar="N", help="add a copy of shorter side N to each (super-resolution)")
    add("--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}: all cores)")
    actions, share = get_args(get_type_hints(BadSamplePolicy)["action"]), SKIP.max_share
    text = f"what becomes of images that cannot be used (default {SKIP.action})"
    add("--bad-samples.action", choices=actions, default=SKIP.action, dest="action", help=text)
    text = f"share of them above which it ends all the same (default {share})"
    add("--bad-samples.max_share", type=float, default=share, dest="max_share", metavar="X", help=text)
    return parser


def _kind(channels: int | None, bits: int | None) -> ImageKind | None:
    """Return the declared kind of images; None if nothing is declared."""
    found: Any = {"channels": channels, "bits": bits}
    given = {name: value for name, value in found.items() if value is not None}
    return ImageKind(**given, convert="exact") if given else None


def _run(arguments: Sequence[str] | None) -> None:
    given = _parser().parse_args(arguments)
    packed, _ = pack_folder(
        given.images,
        given.out,
        given.captions,
        given.val_fraction,
        given.resize,
        given.shard_size,
        Extras(given.masks, given.low_res),
        given.columns,
        given.workers,
        BadSamplePolicy(given.action, given.max_share),
        _kind(given.channels, given.bits),
    )
    if not packed:
        print(f"{given.out}: {ALREADY}")
    if (given.out / REPORT).exists():  # sets of earlier versions have none
        print((given.out / REPORT).read_text(encoding="utf-8"), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
