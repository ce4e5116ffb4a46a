"""Pack a folder of images with captions into tar shards: ``python -m data.folder``."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.captions import (
    Item,
    Skipped,
    advice,
    class_names,
    from_classes,
    from_folder,
    from_table,
    images_only,
)
from data.masks import random_mask
from data.report import CLASSES, REPORT, Report
from data.writing import Members, pack
from ldm.cli import run_command
from ldm.data.raster import rgb
from ldm.io.atomic import write_text

MASK_SIDE = 256
"""Shorter side of a mask in pixels, at most: data loading brings it to the image's size."""

WAYS = {"txt": from_folder, "folders": from_classes, "none": images_only}
"""Values of --captions other than a table."""

HELP = """\
Pack a folder of images with captions into tar shards.

Captions are .txt files next to the images (cat.jpg, cat.txt), or as --captions states: "folders" takes the
name of an image's folder (one per class) as caption and class, "none" packs the images alone, and a table
(CSV, TSV or JSONL) has the columns file (relative to the folder), caption and, if there are classes, label.
The columns may also be called file_name, image or path, and text or prompt, as in the metadata.jsonl of
Hugging Face; --columns names others.

Images are jpg, jpeg, png or webp; their bytes are kept unless --resize asks for smaller ones. What cannot be
used is skipped, counted and listed in skipped.txt. --masks adds a random mask to each image, to train
inpainting; --low-res N a copy whose shorter side is N pixels, to train super-resolution.

If the folder already holds the same set, nothing is done. docs/own-images.md says how to go on."""


@dataclass(frozen=True)
class Extras:
    """Members to condition on, made from each image.

    Args:
        masks: Whether to draw a random mask, which the image's name decides.
        low_res: Shorter side in pixels of a low-resolution copy; None makes none.
    """

    masks: bool = False
    low_res: int | None = None

    def __post_init__(self) -> None:
        if self.low_res is not None and self.low_res < 1:
            raise ValueError(f"--low-res: {self.low_res}, expected at least 1")

    def members(self, name: str, content: bytes) -> dict[str, bytes]:
        """Make the members of one image."""
        if not self.masks and self.low_res is None:
            return {}
        image = _image(content)
        found: dict[str, Image.Image] = {}
        if self.masks:
            width, height = _scaled(image.size, min(MASK_SIDE, *image.size))
            found["mask.png"] = Image.fromarray(random_mask(name, height, width))
        if self.low_res is not None:
            size = _scaled(image.size, self.low_res)
            found["low.png"] = image.resize(size, Image.Resampling.BOX)
        return {member: _png(made) for member, made in found.items()}


def pack_folder(
    source: Path,
    out: Path,
    captions: str = "txt",
    val_fraction: float = 0.05,
    resize: int | None = None,
    shard_size: int = 1000,
    extras: Extras | None = None,
    columns: Sequence[str] = (),
) -> tuple[bool, Skipped]:
    """Write train and val shards of a folder of images.

    Args:
        source: Folder of images, searched with its subfolders.
        out: Folder for the shards.
        captions: "txt" (x.txt next to x.jpg), "folders" (one per class), "none", or a table.
        val_fraction: Fraction of the images for val-*.tar, in [0, 1), selected by a hash of their names.
        resize: Shorter side in pixels to which larger images are reduced; None keeps the files' bytes.
        shard_size: Samples per shard.
        extras: Members to condition on, made from each image; None makes none.
        columns: Columns of the table: file, caption and perhaps label; none takes the usual names.

    Returns:
        False if the shards were already there, and what was skipped.

    Raises:
        FileNotFoundError: If the folder or the table is missing.
        ValueError: If there are no images, the table lacks a column, or ``out`` holds other shards.
    """
    _check(source, val_fraction, resize, shard_size)
    if columns and (len(columns) not in (2, 3) or captions in WAYS):
        raise ValueError(
            f"--columns: got {' '.join(columns)}, expected FILE CAPTION [LABEL] of a table of --captions"
        )
    extras = extras or Extras()
    skipped = Skipped()
    items = _find(source, captions, columns, skipped)
    items.sort(key=lambda item: hashlib.sha256(item.name.encode()).digest())
    num_val = max(1, round(val_fraction * len(items))) if val_fraction else 0
    if num_val >= len(items):
        raise ValueError(
            f"{source}: {len(items)} usable images are too few for --val-fraction {val_fraction}"
            f"{', skipped ' if skipped else ''}{skipped.counts()}"
        )
    split_items = {"train": items[num_val:], "val": items[:num_val]}
    report = Report(out)
    splits = {
        name: _samples(found, source, resize, extras, skipped, report.add(name))
        for name, found in split_items.items()
        if found
    }
    settings = {
        "set": "folder",
        "version": 1,
        "val_fraction": val_fraction,
        "resize": resize,
        "shard_size": shard_size,
        "source": _fingerprint(items, source),
        "masks": extras.masks or None,
        "low_res": extras.low_res,
    }
    words = {"source": f"{len(items)} images of {source.name}, captions {Path(captions).name}"}

    def finish() -> None:
        kinds = class_names([item.name for item in items]) if captions == "folders" else []
        _write_about(out, skipped, kinds, report)

    return pack(out, settings, splits, shard_size, len(items), words, finish), skipped


def _write_about(out: Path, skipped: Skipped, kinds: Sequence[str], report: Report) -> None:
    write_text(out / "skipped.txt", skipped.listing())
    if kinds:
        write_text(out / CLASSES, "".join(f"{kind}\n" for kind in kinds))
    write_text(out / REPORT, report.text(skipped))


def _check(source: Path, val_fraction: float, resize: int | None, shard_size: int) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"--images: '{source}' is not a folder")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"--val-fraction: {val_fraction}, expected at least 0 and below 1")
    if resize is not None and resize < 1:
        raise ValueError(f"--resize: {resize}, expected at least 1")
    if shard_size < 1:
        raise ValueError(f"--shard-size: {shard_size}, expected at least 1")


def _find(source: Path, captions: str, columns: Sequence[str], skipped: Skipped) -> list[Item]:
    if captions in WAYS:
        items = WAYS[captions](source, skipped)
    else:
        items = from_table(Path(captions), source, columns, skipped)
    if not items:
        found = f"skipped {skipped.counts()}" if skipped else "no jpg, jpeg, png or webp"
        raise ValueError(
            f"--images: nothing to pack in '{source}', {found}{advice(source, captions, skipped)}"
        )
    return items


def _fingerprint(items: Sequence[Item], source: Path) -> str:
    """Hash the inputs of the shards: names, captions, labels, sizes and times of the files."""
    digest = hashlib.sha256()
    for item in items:
        stat = (source / item.name).stat()
        digest.update(repr((item, stat.st_size, stat.st_mtime_ns)).encode())
    return digest.hexdigest()


def _samples(
    items: Sequence[Item],
    source: Path,
    resize: int | None,
    extras: Extras,
    skipped: Skipped,
    packed: Callable[[Item, tuple[int, int]], None],
) -> Iterator[Members]:
    for item in items:
        path = source / item.name
        content, kind = path.read_bytes(), path.suffix[1:].lower()
        try:  # by the code that will read it in training: what passes here is not a bad sample there
            image = _image(content)
        except Exception as error:  # a damaged file may drive Pillow into any kind
            skipped.add("cannot be decoded", f"{item.name} ({error})")
            continue
        packed(item, image.size)
        if resize is not None and min(image.size) > resize:
            content, kind = _reduce(image, kind, resize)
        yield {**_members(item, content, kind), **extras.members(item.name, content)}


def _members(item: Item, content: bytes, kind: str) -> Members:
    # the hash of the path is unique, free of the dots that would end a key, and the same in a larger set
    sample: dict[str, str | bytes] = {
        "__key__": hashlib.sha256(item.name.encode()).hexdigest()[:16],
        kind: content,
    }
    meta: dict[str, str | int] = {"file": item.name}
    if item.caption is not None:
        sample["txt"] = item.caption
    if item.label is not None:
        sample["cls"], meta["label"] = str(item.label), item.label
    sample["json"] = json.dumps(meta, ensure_ascii=False)
    return sample


def _image(content: bytes) -> Image.Image:
    return Image.fromarray(rgb(content).permute(1, 2, 0).numpy())


def _reduce(image: Image.Image, kind: str, side: int) -> tuple[bytes, str]:
    """Bring the shorter side down to ``side``: PNG stays PNG, the others become JPEG of quality 95."""
    small, out = image.resize(_scaled(image.size, side), Image.Resampling.LANCZOS), io.BytesIO()
    if kind == "png":
        return _png(small), "png"
    small.save(out, "JPEG", quality=95)
    return out.getvalue(), "jpg"


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return width and height of an image whose shorter side becomes ``side``."""
    scale = side / min(size)
    return max(side, round(size[0] * scale)), max(side, round(size[1] * scale))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.folder", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images, searched with its subfolders")
    add("--out", type=Path, required=True, help="folder for the shards; made if missing")
    add("--captions", default="txt", help='"txt" (default), "folders", "none", or a CSV, TSV or JSONL file')
    add("--columns", nargs="+", default=(), metavar="NAME", help="the table's columns: FILE CAPTION [LABEL]")
    add("--val-fraction", type=float, default=0.05, metavar="X", help="fraction for val-*.tar (default 0.05)")
    add("--resize", type=int, metavar="N", help="reduce larger images to this shorter side in pixels")
    add("--shard-size", type=int, default=1000, metavar="N", help="samples per shard (default 1000)")
    add("--masks", action="store_true", help="add a random mask to each image (inpainting)")
    add("--low-res", type=int, metavar="N", help="add a copy of shorter side N to each (super-resolution)")
    return parser


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
    )
    if not packed:
        print(f"{given.out}: already packed with these settings, nothing to do")
    if (given.out / REPORT).exists():  # sets of earlier versions have none
        print((given.out / REPORT).read_text(encoding="utf-8"), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
