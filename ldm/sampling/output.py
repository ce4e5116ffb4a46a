"""Folder of the images of one call: those of another call are never mixed with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from PIL import UnidentifiedImageError

from ldm.io.atomic import sweep
from ldm.io.images import read_text

DEFAULT = "samples"
"""Folder of a call that names none; further ones get -2, -3 ..."""
GRID = "grid.png"
"""Overview of the images; readers of the folder leave it out."""
FORMATS = (".png", ".jpg", ".jpeg", ".webp")
CIRCUMSTANCES = ("checkpoint", "software")
"""Metadata that may differ between two calls that draw the same images."""


def image_path(folder: Path, number: int) -> Path:
    """Return the file of an image."""
    return folder / f"{number:06d}.png"


def output_folder(out: str | None, metadata: Sequence[Mapping[str, str]]) -> Path:
    """Find the folder for the images of a call. The images of the same call may be there: they are replaced.

    Args:
        out: --out, or None for the first of samples, samples-2 ... that has no other images.
        metadata: Metadata for the file of each image, in order.

    Raises:
        ValueError: If ``out`` has images of another call.
    """
    if out is None:
        names = (Path(DEFAULT if number == 1 else f"{DEFAULT}-{number}") for number in count(1))
        return next(folder for folder in names if _other_image(folder, metadata) is None)
    if (other := _other_image(Path(out), metadata)) is not None:
        raise ValueError(
            f"--out: '{other}' is an image of another call, and the two would be mixed: name another folder, "
            "or remove the images"
        )
    sweep(Path(out))
    return Path(out)


def _other_image(folder: Path, metadata: Sequence[Mapping[str, str]]) -> Path | None:
    """Return an image of a folder that this call would not write, if there is one."""
    expected = {image_path(folder, i): _identity(text) for i, text in enumerate(metadata)}
    images = [path for path in folder.iterdir() if path.suffix.lower() in FORMATS] if folder.is_dir() else []
    others = (p for p in sorted(images) if p.name != GRID and (p not in expected or _read(p) != expected[p]))
    return next(others, None)


def _read(path: Path) -> dict[str, str] | None:
    try:
        return _identity(read_text(path))
    except (UnidentifiedImageError, OSError):
        return None


def _identity(text: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in text.items() if name not in CIRCUMSTANCES}
