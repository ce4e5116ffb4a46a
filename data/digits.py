"""Pack the handwritten digits that scikit-learn carries into shards: ``python -m data.digits``.

1,797 grey images of 8x8 (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits").
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.report import closing
from data.writing import Members, Samples, contents, pack
from ldm.cli import run_command
from ldm.data.order import permutation

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8
SHARD_SIZE = 500

HELP = """\
Pack the real handwritten digits of scikit-learn (1,797 images of 8x8) into tar shards.

Each sample has four members: KEY.png (the image), KEY.txt ("a handwritten digit three"), KEY.cls (3) and
KEY.json ({"label": 3}). train-*.tar and val-*.tar hold each digit in equal proportion, always the same ones.

If the folder already holds the same set, nothing is done."""


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 8, 8) uint8 in [0, 255], black background, and labels (N,) int64.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is missing: pip install 'ldm[digits]'"
        ) from error
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def split(labels: np.ndarray, num_val: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split into training and validation samples, each class in the same proportion.

    All samples are shuffled and sorted by their rank within their class, relative to its size: each section
    of that order holds the classes in equal proportion.

    Returns:
        Indices of training and of validation samples.
    """
    shuffled = permutation(len(labels), seed)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels[shuffled] == label)
        rank[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    order = shuffled[np.argsort(rank, kind="stable")]
    return order[num_val:], order[:num_val]


def pack_digits(out: Path, num_val: int = 297, size: int = SIDE, seed: int = 0) -> bool:
    """Write train and val shards into ``out``; False if they were already there.

    Args:
        out: Folder for the shards.
        num_val: Validation samples.
        size: Side of the images in pixels, a multiple of 8; larger ones repeat each pixel.
        seed: Seed of the split.

    Raises:
        ValueError: If an argument is out of its range or ``out`` holds other shards.
        ModuleNotFoundError: If scikit-learn is missing.
    """
    images, labels = load()
    if size < SIDE or size % SIDE:
        raise ValueError(f"--size: {size}, expected a multiple of {SIDE}")
    if not 0 < num_val < len(labels):
        raise ValueError(f"--val: {num_val}, expected 1 to {len(labels) - 1}")
    train, val = split(labels, num_val, seed)
    images = images.repeat(size // SIDE, axis=1).repeat(size // SIDE, axis=2)
    settings = {"set": "digits", "version": 1, "val": num_val, "size": size, "seed": seed}
    splits = {
        name: Samples(_samples(rows, images, labels)) for name, rows in (("train", train), ("val", val))
    }
    return pack(out, settings, splits, SHARD_SIZE, len(labels))


def _samples(rows: np.ndarray, images: np.ndarray, labels: np.ndarray) -> Iterator[Members]:
    for row in rows.tolist():
        label, png = int(labels[row]), io.BytesIO()
        Image.fromarray(images[row]).convert("RGB").save(png, "PNG")
        yield {
            "__key__": f"digits-{row:06d}",
            "png": png.getvalue(),
            "txt": f"a handwritten digit {WORDS[label]}",
            "cls": str(label),
            "json": json.dumps({"label": label}),
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.digits", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; made if missing")
    parser.add_argument("--val", type=int, default=297, metavar="N", help="validation samples (default 297)")
    parser.add_argument(
        "--size",
        type=int,
        default=SIDE,
        metavar="N",
        help="side of the images, a multiple of 8 (default 8)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (default 0)")
    return parser


def _run(arguments: Sequence[str] | None) -> None:
    options = _parser().parse_args(arguments)
    packed = pack_digits(options.out, options.val, options.size, options.seed)
    print(closing(options.out, packed, contents(options.out), "demo/digits", Path("shards/digits")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
