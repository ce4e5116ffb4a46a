"""Images to samples of a shard, on all cores: the same ones in the same order for any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from data import parquet
from data.images import KindImage, PackedImage, RGBImage, png, scaled
from data.items import Item, Skipped, suffix
from data.masks import random_mask
from data.writing import Finished, Members, Samples
from ldm.data.bad_samples import Tally
from ldm.data.kinds import OtherKind
from ldm.types import ImageKind

MASK_SIDE = 256
"""Shorter side of a mask in pixels, at most: data loading brings it to the image's size."""
BATCH = 16
"""Images that a process is given at once."""
_STARTS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


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

    def members(self, name: str, opened: Callable[[], PackedImage]) -> dict[str, bytes]:
        """Make the members of one image."""
        if not self.masks and self.low_res is None:
            return {}
        image, found = opened(), dict[str, bytes]()
        if self.masks:
            width, height = scaled(image.size, min(MASK_SIDE, *image.size))
            found["mask.png"] = png(Image.fromarray(random_mask(name, height, width)))
        if self.low_res is not None:
            found["low.png"] = image.low_res(self.low_res)
        return found


class Made(NamedTuple):
    """An image that was looked at.

    Args:
        item: The image.
        members: The sample; None if it cannot be used.
        size: Width and height in pixels.
        problem: Reason why it cannot be used, and details.
    """

    item: Item
    members: Members | None = None
    size: tuple[int, int] = (0, 0)
    problem: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Sampling(Dataset[Made]):
    """Makes the sample of an image.

    Args:
        folder: Folder of the images.
        resize: Shorter side in pixels to which larger images are reduced; None keeps the files' bytes.
        extras: Members to condition on.
        columns: Columns of Parquet files.
        kind: Channels and bits that images are read and reduced with; None: RGB of 8 bits.
    """

    folder: Path
    resize: int | None = None
    extras: Extras = field(default_factory=Extras)
    columns: Sequence[str] = ()
    kind: ImageKind | None = None

    def __getitem__(self, job: tuple[Item, bytes | None]) -> Made:
        """Make the sample of an image, whose bytes are read from its file where none are given."""
        item, given = job
        try:
            content = (self.folder / item.name).read_bytes() if given is None else given
        except OSError as error:
            return Made(item, problem=("cannot be read", str(error.strerror)))
        if not content and item.row is not None:
            return Made(item, problem=("without the bytes of an image", ""))
        try:
            image = self._opened(content)
        except OtherKind as error:
            return Made(item, problem=("of another kind", str(error)))
        except Exception as error:  # a damaged file may drive Pillow into any kind
            return Made(item, problem=("cannot be decoded", str(error)))
        content, kind = image.content, _kind(image.content) if item.row is not None else suffix(item.name)
        kind = "png" if image.is_tiff else kind
        if self.resize is not None and min(image.size) > self.resize:
            content, kind = image.reduced(self.resize, kind)
        more = self.extras.members(item.name, lambda: self._opened(content))
        return Made(item, {**_members(item, content, kind), **more}, image.size)

    def _opened(self, content: bytes) -> PackedImage:
        """Decode an image by the code of training: what passes here is not a bad sample there."""
        return RGBImage(content) if self.kind is None else KindImage(content, self.kind)

    def made(self, items: Sequence[Item], workers: int) -> Iterator[Made]:
        """Look at images in their order.

        Args:
            items: The images; those of Parquet files in the order of their rows.
            workers: Processes; 1 works in this one.
        """
        jobs: Iterable[tuple[Item, bytes | None]] = ((item, None) for item in items)
        if items and items[0].row is not None:
            jobs = parquet.contents(self.folder, items, self.columns)
        yield from _in_order(self, jobs, workers)


class ItemSamples(Samples):
    """The samples of images, without those that cannot be used.

    Args:
        sampling: Makes the sample of an image.
        items: The images; those of Parquet files in the order of their rows.
        workers: Processes; 1 works in this one.
        skipped: Takes what cannot be used.
        tally: Counts it by a policy; it has counted all images as read.
        packed: Called with each image that can, and its shorter side in pixels.
    """

    def __init__(
        self,
        sampling: Sampling,
        items: Sequence[Item],
        workers: int,
        skipped: Skipped,
        tally: Tally,
        packed: Callable[[Item, int], None],
    ) -> None:
        self.sampling, self.items, self.workers = sampling, items, workers
        self.skipped, self.tally, self.packed = skipped, tally, packed
        self._next = 0
        """Position of the next image."""
        self._sides: list[int] = []
        self._bad: list[tuple[int, str, str]] = []
        """Position of each bad image since the last note, the reason and details."""

    @override
    def after(self, finished: Sequence[Finished]) -> Iterator[Members]:
        for shard in finished:
            self._restore(**shard.note)
        for made in self.sampling.made(self.items[self._next :], self.workers):
            position, self._next = self._next, self._next + 1
            if made.members is None:
                self._bad.append((position, *made.problem))
                self._skip(made.item, *made.problem)
            else:
                self._sides.append(min(made.size))
                self.packed(made.item, min(made.size))
                yield made.members

    @override
    def note(self) -> dict[str, Any]:
        found = {"end": self._next, "bad": self._bad, "sides": self._sides}
        self._bad, self._sides = [], []
        return found

    def _restore(self, end: int, bad: Sequence[tuple[int, str, str]], sides: Sequence[int]) -> None:
        """Count the images of a shard as they were counted when it was packed."""
        problems = {position: problem for position, *problem in bad}
        left = iter(sides)
        for position in range(self._next, end):
            item = self.items[position]
            if position in problems:
                self._skip(item, *problems[position])
            else:
                self.packed(item, next(left))
        self._next = end

    def _skip(self, item: Item, reason: str, details: str) -> None:
        name = f"{item.name} ({details})" if details else item.name
        self.skipped.add(reason, name)
        self.tally.count(0, [f"{name}: {reason}"])


def _in_order(dataset: Dataset[Made], jobs: Iterable[Any], workers: int) -> Iterator[Made]:
    """Do jobs in processes: a loader returns them in order and holds few at once."""
    batches: Any = _batches(jobs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # --workers says how many
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=0 if workers == 1 else workers,
            collate_fn=list,
            worker_init_fn=_end_with_parent,
        )
        made = iter(loader)
    for batch in made:
        yield from batch


def _end_with_parent(worker: int) -> None:
    """End this process when its parent is gone: torch's own watch waits until its results were read."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _batches(jobs: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(jobs)
    while batch := list(islice(rest, BATCH)):
        yield batch


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


def _kind(content: bytes) -> str:
    return next((kind for start, kind in _STARTS.items() if content.startswith(start)), "jpg")
