"""The reference set of ``ldm.evaluate``: shards, a folder, or a file of statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.utils.data import Dataset

from ldm.cli import naming
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.fields import Sample
from ldm.data.filters import Filter
from ldm.data.raster import DECODER
from ldm.data.readers import Indexed
from ldm.evaluation.files import ImageArray, ImageFolder, open_images
from ldm.io.weights import sha256
from ldm.metrics.reference import array_names
from ldm.types import RGB8, ImageKind


@dataclass(frozen=True)
class ReferenceImages:
    """Real images, or their statistics, to compare with.

    Args:
        samples: The images; None if there is a file of statistics only.
        identity: Text that changes when they do; None if there is a file of statistics only.
        fingerprint: Their name in records, or None.
        statistics: File of them for Inception, or None.
        size: Side of the images; None if the file knows.
    """

    samples: Dataset[Sample] | None
    identity: str | None
    fingerprint: str | None
    statistics: str | None
    size: int | None


def open_shards(
    pattern: str,
    size: int | None,
    reads: Collection[str] = (),
    classes: Mapping[str, int] | None = None,
    kept: Filter | None = None,
    index_dir: str | None = None,
    kind: ImageKind = RGB8,
) -> EvaluationSet:
    """Open shards.

    Args:
        pattern: The shards.
        size: Side to which images are cropped and resized, in pixels.
        reads: Fields that a sample must give.
        classes: Number of classes of fields that hold some.
        kept: Filter of the samples; None keeps all.
        index_dir: Folder of the indices; None: that of each shard, or a cache where it is read-only.
        kind: Channels and bits of the images.

    Raises:
        ValueError: If there is no size, or the shards cannot be used.
    """
    if size is None:
        raise ValueError("--size: got none, expected the side of the images of --data")
    reader = Indexed(index_dir=index_dir)
    return reader.evaluation(pattern, size, "--data", lambda _: reads, None, classes, kept, kind)


def real_images(
    reference: str | None, samples: EvaluationSet | None, size: int | None, kind: ImageKind = RGB8
) -> ReferenceImages:
    """Find what is compared with: --reference, or else all of the samples."""
    if reference is None:
        assert samples is not None
        num = len(samples)
        return ReferenceImages(samples, samples.identity(num), samples.fingerprint(num), None, size)
    if Path(reference).is_dir():
        images = open_images(reference, "--reference", kind)
        return ReferenceImages(images, *_folder(Path(reference), images), None, images.size)
    if not Path(reference).is_file():
        raise FileNotFoundError(f"--reference: '{reference}' does not exist, expected a folder or .npz file")
    with naming("--reference"):
        names = array_names(reference)
    if "arr_0" not in names:
        return ReferenceImages(None, None, None, reference, None)
    images, contents = open_images(reference, "--reference", kind), sha256(reference)
    return ReferenceImages(images, contents, contents, reference, images.size)


def _folder(folder: Path, images: ImageFolder | ImageArray) -> tuple[str, str]:
    """Identify the images of a folder: by names, sizes and times of files, and without the times."""
    assert isinstance(images, ImageFolder)
    files = [(str(path.relative_to(folder)), path.stat()) for path in images.paths]
    what = [DECODER] if images.kind == RGB8 else [DECODER, asdict(images.kind)]
    names = json.dumps([*what, *((name, stat.st_size) for name, stat in files)])
    times = json.dumps([stat.st_mtime_ns for _, stat in files])
    return f"{names} {times}", hashlib.sha256(names.encode()).hexdigest()
