"""Images that lie in files: folders of them, and .npz files of ADM's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data import raster
from ldm.data.fields import Sample
from ldm.data.kinds import decoded
from ldm.types import RGB8, ImageKind

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
"""Suffix of an image file to its format, as Pillow names it."""


class ImageFolder(Dataset[Sample]):
    """Images of a folder and the folders in it, by the order of their paths, decoded as those of shards are.

    Hidden files and folders, whose names begin with a dot, are left out.

    Args:
        folder: The folder.
        option: What names it, for messages.
        kind: Channels and bits of the images.

    Raises:
        ValueError: If there is no image; if sizes are mixed: resizing is a choice that changes every number,
            so it is not made here; or if PNGs of ``ldm.sample`` are of several checkpoints.
    """

    def __init__(self, folder: str, option: str, kind: ImageKind = RGB8) -> None:
        self.folder, self.option, self.kind = Path(folder), option, kind
        files = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in FORMATS and self._is_shown(p))
        self.paths = [path for path in files if not self._is_grid(path)]
        if not self.paths:
            raise ValueError(f"{option}: folder '{folder}' holds none, expected some of {', '.join(FORMATS)}")
        height, width = self._size(self.paths[0])
        for path in self.paths:
            if (size := self._size(path)) != (height, width):
                raise ValueError(
                    f"{option}: '{path}' is of {size[1]} x {size[0]} pixels, expected {width} x {height} "
                    f"like '{self.paths[0]}': bring all to one size"
                )
        self._check_origin()
        self.size = width

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Sample:
        path = self.paths[i]
        with self._naming(path):
            pixels = decoded(path.read_bytes(), self.kind, tuple(FORMATS.values()))
        return {"key": str(path.relative_to(self.folder)), "image": pixels}

    def _is_shown(self, path: Path) -> bool:
        """Whether it is an image, and no hidden copy or note of macOS or a notebook."""
        return not any(name.startswith((".", "__MACOSX")) for name in path.relative_to(self.folder).parts)

    def _is_grid(self, path: Path) -> bool:
        """Whether it is the grid that ``ldm.sample`` writes with its images."""
        return path.name == "grid.png" and self._text(path).get("software", "").startswith("ldm ")

    def _check_origin(self) -> None:
        """Check that no images of an earlier call of ``ldm.sample`` are left in between."""
        first: dict[str, Path] = {}
        for path in self.paths:
            if sha256 := self._text(path).get("checkpoint_sha256"):
                first.setdefault(sha256, path)
        if len(first) > 1:
            found = " and ".join(
                f"'{path.name}' of {sha256[:12]}" for sha256, path in list(first.items())[:2]
            )
            raise ValueError(
                f"{self.option}: folder '{self.folder}' mixes images of {len(first)} checkpoints ({found}, "
                "their checkpoint_sha256): give those of each a folder of its own"
            )

    def _text(self, path: Path) -> dict[str, str]:
        """Read the text chunks of a PNG that lie before its pixels; other files have none."""
        if path.suffix.lower() != ".png":
            return {}
        with self._naming(path), Image.open(path, formats=("PNG",)) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}

    def _size(self, path: Path) -> tuple[int, int]:
        with self._naming(path):
            return raster.upright_size(path, tuple(FORMATS.values()))

    @contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.option}: '{path}' cannot be read: {error}") from error


class ImageArray(Dataset[Sample]):
    """Images of an .npz file, ``arr_0`` (N, H, W, 3) uint8: how ADM's evaluation takes them; or of a kind.

    Args:
        path: The file.
        option: What names it, for messages.
        kind: Channels and bits of the images.

    Raises:
        ValueError: If it holds something else.
    """

    def __init__(self, path: str, option: str, kind: ImageKind = RGB8) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.images = file["arr_0"]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{option}: '{path}' holds no images 'arr_0': {error}") from error
        shape, dtype = self.images.shape, self.images.dtype
        expected = f"uint{kind.bits} (N, H, W, {kind.channels})"
        if len(shape) != 4 or f"{dtype} (N, H, W, {shape[3]})" != expected or not len(self.images):
            raise ValueError(f"{option}: arr_0 of '{path}' is {dtype} {shape}, expected {expected}")
        self.size = int(shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample:
        return {"key": f"{i:06d}", "image": torch.from_numpy(self.images[i]).permute(2, 0, 1)}


def open_images(path: str, option: str, kind: ImageKind = RGB8) -> ImageFolder | ImageArray:
    """Open a folder or an .npz file of images.

    Args:
        path: Folder or file.
        option: What names it, for messages.
        kind: Channels and bits of the images.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if Path(path).is_dir():
        return ImageFolder(path, option, kind)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: '{path}' does not exist, expected a folder or an .npz file")
    return ImageArray(path, option, kind)
