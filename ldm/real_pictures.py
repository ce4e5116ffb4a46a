"""What ``ldm.evaluate`` compares with: shards, a folder, or a file of statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ldm.candidates import open_pictures
from ldm.data.decode import Sample
from ldm.data.readers import Indexed
from ldm.data.source import Spec
from ldm.metrics.reference import array_names


@dataclass(frozen=True)
class RealPictures:
    """What is compared with.

    Args:
        samples: The pictures; None if there is a file of statistics only.
        identity: Text that changes when they do.
        statistics: File of them for Inception, or None.
        size: Side of the pictures; None if the file knows.
    """

    samples: Dataset[Sample] | None
    identity: str | None
    statistics: str | None
    size: int | None


def open_shards(pattern: str, size: int | None) -> Dataset[Sample]:
    """Open shards; pictures are cropped and resized to the size."""
    if size is None:
        raise ValueError("--size: got none, expected the side of the pictures of --data")
    return Indexed().evaluation(pattern, Spec(("image",), size, 0))


def real_pictures(
    reference: str | None, data: str | None, samples: Dataset[Sample] | None, size: int | None
) -> RealPictures:
    """Find what is compared with: --reference, or else all of --data."""
    if reference is None:
        return RealPictures(samples, json.dumps([data, size]), None, size)
    if Path(reference).is_dir():
        pictures = open_pictures(reference)
        return RealPictures(pictures, reference, None, pictures.size)
    if not Path(reference).is_file():
        raise FileNotFoundError(f"--reference: '{reference}' does not exist, expected a folder or .npz file")
    if "arr_0" not in array_names(reference):
        return RealPictures(None, None, reference, None)
    pictures = open_pictures(reference)
    return RealPictures(pictures, reference, reference, pictures.size)
