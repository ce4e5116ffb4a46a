"""What ``ldm.evaluate`` compares with: shards, a folder, or a file of statistics."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ldm.candidates import PictureArray, PictureFolder, open_pictures
from ldm.data.decode import Sample
from ldm.data.readers import Indexed
from ldm.data.source import Evaluation, Spec
from ldm.metrics.reference import array_names
from ldm.weights import sha256


@dataclass(frozen=True)
class RealPictures:
    """What is compared with.

    Args:
        samples: The pictures; None if there is a file of statistics only.
        identity: Text that changes when they do; None if there is a file of statistics only.
        fingerprint: What records call them, or None.
        statistics: File of them for Inception, or None.
        size: Side of the pictures; None if the file knows.
    """

    samples: Dataset[Sample] | None
    identity: str | None
    fingerprint: str | None
    statistics: str | None
    size: int | None


def open_shards(pattern: str, size: int | None) -> Evaluation:
    """Open shards; pictures are cropped and resized to the size."""
    if size is None:
        raise ValueError("--size: got none, expected the side of the pictures of --data")
    return Indexed().evaluation(pattern, Spec(("image",), size, 0))


def real_pictures(reference: str | None, samples: Evaluation | None, size: int | None) -> RealPictures:
    """Find what is compared with: --reference, or else all of the samples."""
    if reference is None:
        assert samples is not None
        num = len(samples)
        return RealPictures(samples, samples.identity(num), samples.fingerprint(num), None, size)
    if Path(reference).is_dir():
        pictures = open_pictures(reference)
        return RealPictures(pictures, *_folder(Path(reference), pictures), None, pictures.size)
    if not Path(reference).is_file():
        raise FileNotFoundError(f"--reference: '{reference}' does not exist, expected a folder or .npz file")
    if "arr_0" not in array_names(reference):
        return RealPictures(None, None, None, reference, None)
    pictures, contents = open_pictures(reference), sha256(reference)
    return RealPictures(pictures, contents, contents, reference, pictures.size)


def _folder(folder: Path, pictures: PictureFolder | PictureArray) -> tuple[str, str]:
    """Identify the pictures of a folder: by names, sizes and times of files, and without the times."""
    assert isinstance(pictures, PictureFolder)
    files = [(str(path.relative_to(folder)), path.stat()) for path in pictures.paths]
    names = json.dumps([(name, stat.st_size) for name, stat in files])
    times = json.dumps([stat.st_mtime_ns for _, stat in files])
    return f"{names} {times}", hashlib.sha256(names.encode()).hexdigest()
