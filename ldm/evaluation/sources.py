"""Candidates of ``ldm.evaluate``: images that a checkpoint draws, and images in files."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.fields import Sample, collate, converted
from ldm.evaluation.files import open_images
from ldm.evaluation.isolation import replaced
from ldm.evaluation.record import describe_sampling
from ldm.io.images import check_finite, rounded
from ldm.metrics.metric import Metadata, Metric
from ldm.stages.stage import Stage
from ldm.types import RGB8, Batch, Generates, ImageKind

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Repeated(Dataset[Sample]):
    """The first ``num`` samples of an endless repetition; copies have keys, so random numbers, of their own.

    Args:
        samples: What is repeated.
        num: How many samples there are in the end.
    """

    def __init__(self, samples: Dataset[Sample], num: int) -> None:
        self.samples, self.num = samples, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Sample:
        copy, row = divmod(i, len(self.samples))  # type: ignore[arg-type]
        sample = self.samples[row]
        return {**sample, "key": f"{sample['key']}#{copy}"} if copy else sample


@dataclass(frozen=True)
class RankSubset:
    """Samples of a process, and their loading.

    Args:
        rank: Number of this process.
        world: Number of processes.
        batch_size: Samples at once.
        device: Where they go.
        num_workers: Processes that read and decode.
    """

    rank: int
    world: int
    batch_size: int
    device: torch.device
    num_workers: int

    def batches(self, samples: Dataset[Sample]) -> Iterator[Batch]:
        """Yield this process's samples, rank, rank + world, ..., with their places."""
        mine = range(self.rank, len(samples), self.world)  # type: ignore[arg-type]
        starts = range(0, len(mine), self.batch_size)
        indices = [list(mine[start : start + self.batch_size]) for start in starts]
        loader: Any = DataLoader(
            samples, batch_sampler=indices, collate_fn=collate, num_workers=self.num_workers
        )
        for batch, index in zip(loader, indices, strict=True):
            for skipped in batch.pop("skipped", ()):
                warnings.warn(f"bad sample replaced: {skipped.message}", stacklevel=1)
            moved = converted(move_data_to_device(batch, self.device))
            moved["index"] = torch.tensor(index)
            yield moved


class ImageSource(ABC):
    """Images to be measured.

    Args:
        name: Its name in tables.
        size: Side of its images, in pixels.

    Attributes:
        series: Candidates of one series are points of one curve.
        metrics: What it is measured with.
        context_length: Most tokens of a caption that it is drawn for; None without captions.
    """

    metrics: Sequence[Metric] = ()
    context_length: int | None = None

    def __init__(self, name: str, size: int) -> None:
        self.name = self.series = name
        self.size = size

    @abstractmethod
    def images(self, subset: RankSubset) -> Iterator[tuple[Batch, Tensor]]:
        """Yield a process's samples and their images (B, 3, H, W) in [-1, 1], on the levels of a file."""

    @abstractmethod
    def metadata(self) -> Metadata:
        """Return the settings of the images."""


class FolderImages(ImageSource):
    """Images of files.

    Args:
        path: Folder, or .npz file with ``arr_0``.
        num: The first so many; None takes all.
        kind: Channels and bits of the images.
    """

    def __init__(self, path: str, num: int | None = None, kind: ImageKind = RGB8) -> None:
        self.samples = open_images(path, "--images", kind)
        super().__init__(path, self.samples.size)
        found = len(self.samples)
        if num is not None and num > found:
            raise ValueError(f"--num-images: got {num}, but '{path}' holds {found} images")
        self.num = num or found

    def images(self, subset: RankSubset) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the images as they are."""
        for batch in subset.batches(Repeated(self.samples, self.num)):
            yield batch, batch["image"]

    def metadata(self) -> Metadata:
        """Name the files."""
        return {"images": self.name}


class GeneratedImages(ImageSource):
    """Images that a stage draws for samples, in some setting.

    Args:
        name: Its name in tables.
        stage: Diffusion, or an autoencoder, which reconstructs.
        overrides: Sampler and guidance in place of the stage's own.
        samples: Samples to draw images for.
        seed: Seed of the random numbers.
        precision: One of ``PRECISIONS``.
        origin: Where the stage comes from: checkpoint, its hash, averaged weights or not.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        overrides: dict[str, object],
        samples: Dataset[Sample],
        seed: int,
        precision: str,
        origin: Metadata,
    ) -> None:
        super().__init__(name, samples[0]["image"].shape[-1])
        self.stage, self.overrides, self.samples = stage, overrides, samples
        self.context_length = stage.context_length
        self.seed, self.precision, self.origin = seed, precision, origin

    @torch.no_grad()
    def images(self, subset: RankSubset) -> Iterator[tuple[Batch, Tensor]]:
        """Draw; an image depends on seed and sample alone, not on process or batch."""
        assert isinstance(self.stage, Generates)
        for batch in subset.batches(self.samples):
            with replaced(self.stage, self.overrides), self._autocast(subset.device):
                images = self.stage.generate(batch, self.seed)
            check_finite(images, batch["key"])
            yield batch, rounded(images, (self.stage.image_kind or RGB8).bits)

    def metadata(self) -> Metadata:
        """Name checkpoint, sampler, steps, guidance, seed and precision."""
        with replaced(self.stage, self.overrides):
            how = describe_sampling(self.stage)
        return {**self.origin, **how, "seed": self.seed, "precision": self.precision}

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(device.type, dtype) if dtype else nullcontext()


class RealImages(ImageSource):
    """The real images themselves: to measure a CLIP with.

    Args:
        samples: The images.
        origin: What is measured with them.
        metrics: How.
    """

    def __init__(self, samples: Dataset[Sample], origin: Metadata, metrics: Sequence[Metric]) -> None:
        super().__init__(str(origin["checkpoint"]), samples[0]["image"].shape[-1])
        self.samples, self.origin, self.metrics = samples, origin, metrics

    def images(self, subset: RankSubset) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the images as they are."""
        for batch in subset.batches(self.samples):
            yield batch, batch["image"]

    def metadata(self) -> Metadata:
        """Name the CLIP."""
        return self.origin
