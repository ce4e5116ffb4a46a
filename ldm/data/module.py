"""The data module of all stages: shards in, batches out, exact resume."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from typing_extensions import override

from ldm.data.bad_samples import SKIP, BadSamplePolicy, BadSamples
from ldm.data.bucket_rows import shapes_of
from ldm.data.buckets import Buckets
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.fields import STORED_SUBSETS, Sample, check_names, collate, converted
from ldm.data.filters import Filter
from ldm.data.manifest import latents_size, stored_fields
from ldm.data.readers import Indexed, Reader
from ldm.data.resume import check_same
from ldm.data.sets import TrainSet, named_sets
from ldm.data.source import DataRank, SampleSpec, Source
from ldm.data.streaming import Streaming
from ldm.data.tokens import with_token_ids
from ldm.data.view import NO_AUGMENT, Augment
from ldm.stage_protocols import (
    HasClasses,
    ReadsFields,
    ValidatesBatch,
    ValidatesImages,
    ValidatesShards,
    ValidatesSizes,
    progress_of,
)
from ldm.types import RGB8, Batch, ImageKind

__all__ = ["Indexed", "Shards", "Streaming"]
DEFAULT_FIELDS = ("image", "text")
"""Fields for a LightningModule that does not name those that it reads."""


class Shards(L.LightningDataModule):
    """Reads tar shards (data/README.md) for training and validation.

    Training is endless and, with the ``Indexed`` reader, a pure function of the global seed: the same
    samples in the same global order at any number of processes and workers, continued at the exact sample.
    Validation reads each sample once, in order, without padding.

    Args:
        train: Training shards: paths with braces (``train-{000000..000019}.tar``) or globs, or URLs (s3, gs,
            hf, http, https), one or a list; or several sets by their names, see ``TrainSet``.
        val: Validation shards, likewise.
        batch_size: Samples per batch and process.
        image: Channels and bits of the images; None takes those of the stage's autoencoder, else RGB8.
        image_size: Side of the square images in pixels; others are cropped and resized. None takes that of
            the latents (latents.json), or the one that the stage's autoencoder was trained on.
        num_workers: Processes that read and decode; 0 reads in the training process.
        reader: ``Indexed`` (exact; remote shards are staged) or ``Streaming`` (webdataset's pipeline).
        fields: What training samples load: any of image, text, label, latent, mask, low_res, label_map,
            layout, size. None loads what the stage reads, latents instead of images where the shards hold
            them; image and text for a LightningModule that does not say. Validation loads the image and what
            the stage reads, and where all shards have them captions, labels and ``fields``.
        augment: Flips, crops and captions that are drawn for training samples, never for validation.
        filter: Training samples that are used, by an expression about their size, caption length and keys of
            their json, e.g. ``min(width, height) >= 256 and aesthetic > 5.5`` (data/README.md). None: all.
        val_filter: Validation samples that are used, likewise; ``filter`` leaves them alone.
        new_phase: Whether a resumed run may mix sets by other weights; each continues where it stands.
        buckets: Sizes that training images get by their proportions, one for each global batch; None: all are
            square, as in validation. Latents have the sizes that ``ldm.encode --buckets`` gave them.
        bad_samples: What becomes of samples that cannot be used.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, TrainSet],
        val: str | list[str],
        *,
        batch_size: int,
        image: ImageKind | None = None,
        image_size: int | None = None,
        num_workers: int = 0,
        reader: Reader = Indexed(),  # noqa: B008  (stateless)
        fields: Sequence[str] | None = None,
        augment: Augment = NO_AUGMENT,
        filter: str | None = None,
        val_filter: str | None = None,
        new_phase: bool = False,
        buckets: Buckets | None = None,
        bad_samples: BadSamplePolicy = SKIP,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        counts = {"image_size": image_size, "batch_size": batch_size, "num_workers": num_workers}
        for name, value in counts.items():
            lowest = 0 if name == "num_workers" else 1
            if value is not None and value < lowest:
                raise ValueError(f"data.{name}: got {value}, expected at least {lowest}")
        self.sets, self.new_phase = named_sets(train, filter), new_phase
        self.val_shards = val
        self.val_filter = None if val_filter is None else Filter(val_filter, "data.val_filter")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.reader, self.augment, self.buckets = reader, augment, buckets
        self.fields = DEFAULT_FIELDS if fields is None else check_names(fields, "data.fields")
        self._image, self.image_kind, self._image_size = image, image or RGB8, image_size
        self._is_derived = {"fields": fields is None, "image_size": image_size is None}
        self._source: Source | None = None
        self._evaluation: EvaluationSet | None = None
        self._seed = 0
        self._reads: dict[Collection[str], tuple[str, ...]] | None = None
        self._classes: dict[str, int] = {}
        self._global_batch = batch_size
        self.bad = {kind: BadSamples(kind, bad_samples) for kind in ("training", "validation")}

    @property
    def image_size(self) -> int:
        """Side of the images in pixels.

        Raises:
            ValueError: If it is neither given nor derived.
        """
        if self._image_size is None:
            raise ValueError(
                "data.image_size: got none, expected the side of the images in pixels (only diffusion in the "
                "latents of an autoencoder derives it)"
            )
        return self._image_size

    @property
    def train_shards(self) -> list[str]:
        """Patterns of the training shards of all sets."""
        listed = [of.shards for of in self.sets.values()]
        return [each for shards in listed for each in ([shards] if isinstance(shards, str) else shards)]

    @property
    def num_train(self) -> int | None:
        """Training samples of an epoch; None if the reader does not know."""
        return self.source.num_samples

    @property
    def num_val(self) -> int:
        """Validation samples."""
        return len(self.evaluation)

    @property
    def samples(self) -> int:
        """Training samples of complete steps, over all processes: the stage counts them."""
        return 0 if self.trainer is None else progress_of(self.trainer.lightning_module).samples

    @property
    def source(self) -> Source:
        """The training samples; opened on first use."""
        if self._source is None:
            self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            train, size, seed, kind = self.train_shards, self.image_size, self._seed, self.image_kind
            shapes = shapes_of(self.buckets, self.fields, train, size, self._global_batch)
            spec = SampleSpec(self.fields, size, seed, self._classes, self.augment, shapes, kind)
            self._source = self.reader.open(self.sets, spec)
        return self._source

    @property
    def evaluation(self) -> EvaluationSet:
        """The validation samples; opened on first use."""
        if self._evaluation is None:
            more = dict[str, Any](classes=self._classes, kept=self.val_filter, kind=self.image_kind)
            if self._reads is not None:
                more |= {"reads": self._reads.__getitem__, "optional": {"text", "label", *self.fields}}
            self._evaluation = self.reader.evaluation(self.val_shards, self.image_size, **more)
        return self._evaluation

    def derive(self, module: object) -> None:
        """Derive ``fields``, image size and kind, where they were not given, from what is to be trained.

        Called by ``setup`` with the trainer's LightningModule; before that, fields are image and text.
        """
        before = self._derived()
        self._global_batch = self.batch_size * self._rank().world_size
        self.image_kind = self._image or getattr(module, "image_kind", None) or RGB8
        if isinstance(module, HasClasses):
            self._classes = dict(module.classes)
        if isinstance(module, ReadsFields):
            self._reads = {stored: module.reads(stored) for stored in STORED_SUBSETS}
        if any(self._is_derived.values()):
            size = latents_size(self.train_shards, "data.train")
            if self._is_derived["fields"] and isinstance(module, ReadsFields):
                read = module.reads(stored_fields(self.train_shards, "data.train"))
                self.fields = check_names(read, f"the fields that {type(module).__name__} reads")
            if self._is_derived["image_size"]:
                trained = getattr(module, "image_size", None)
                self._image_size = size if size is not None and "latent" in self.fields else trained
        if self._derived() != before:
            self._source = self._evaluation = None

    def _derived(self) -> tuple[Any, ...]:
        return self.fields, self._image_size, self._reads, self._classes, self._global_batch, self.image_kind

    def prepare_data(self) -> None:
        """Index the shards, on the first process alone, before others ask for them."""
        self.reader.prepare(self.sets, self.val_shards, self.val_filter)
        if self.buckets is not None and self.trainer is not None:
            self.derive(self.trainer.lightning_module)
            _ = self.source  # reads the sizes of the images, which the others then find

    def setup(self, stage: str) -> None:
        """Open the shards and check them against the configuration.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken or lack a field, or if they are fewer samples than a batch.
        """
        if self.trainer is not None:
            module = self.trainer.lightning_module
            self.derive(module)
            if isinstance(module, ValidatesImages):
                module.validate_images(self.image_kind)
            if stage == "fit" and isinstance(module, ValidatesShards):
                module.validate_shards(self.fields, self.train_shards, self.val_shards, self.image_size)
        world_size = self._rank().world_size
        if stage == "fit" and self.num_train is not None and self.batch_size * world_size > self.num_train:
            processes = f" x {world_size} processes" if world_size > 1 else ""
            kept = "".join(f" ({line})" for line in self.source.report())
            raise ValueError(
                f"data.batch_size: {self.batch_size}{processes} is more than the {self.num_train} samples of "
                f"data.train{kept}, expected at most as many"
            )
        if self.num_val < world_size:
            raise ValueError(
                f"data.val: {self.num_val} samples for {world_size} processes, expected one for each"
            )
        if stage == "fit" and self.trainer is not None:
            if isinstance(module, ValidatesSizes) and (shapes := self.source.shapes) is not None:
                module.validate_sizes(shapes.sizes)
            for line in self.source.report() if self.trainer.is_global_zero else ():
                print(line, flush=True)
            self.source.check()
            self._validate(collate(self.evaluation.check("data.val")))

    @override
    def train_dataloader(self) -> DataLoader[Sample]:
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0  # the same ones in each pass
        position = (lambda: 0) if overfits else (lambda: self.samples)
        loader = self.source.loader(position, self.batch_size, self.num_workers, self._rank())
        return with_token_ids(loader, self.trainer and self.trainer.lightning_module)

    @override
    def val_dataloader(self) -> DataLoader[Sample]:
        loader = self.evaluation.loader(self.batch_size, self.num_workers, self._rank())
        return with_token_ids(loader, self.trainer and self.trainer.lightning_module)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Remove the reader's own entries from a batch, report bad samples, and let the stage validate it."""
        is_training = self.trainer is None or self.trainer.training
        kind = "training" if is_training else "validation"
        self.bad[kind].note(len(batch["key"]), batch.pop("skipped", ()))
        if self.trainer is not None and is_training:
            self.source.observe(batch)
        self._validate(batch)
        return cast(Batch, batch)

    def _validate(self, batch: Any) -> None:
        if self.trainer is not None and isinstance(self.trainer.lightning_module, ValidatesBatch):
            self.trainer.lightning_module.validate_batch(batch)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        return converted(batch)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "data": self.source.identity(),
            "image": str(self.image_kind),
            "seed": self._seed,
            "samples": self.samples,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; batch size, processes and workers may have changed.

        Raises:
            ValueError: If the seed, the training data, their kind or the reader is another one.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        now = {"data": self.source.identity(), "image": str(self.image_kind), "seed": self._seed}
        check_same(state, now)
        self.source.load_state_dict(state["source"], state.get("samples", 0), self.new_phase)

    @override
    def teardown(self, stage: str) -> None:
        for bad in self.bad.values() if stage == "fit" else ():
            bad.summarize()

    def _rank(self) -> DataRank:
        if self.trainer is None:
            return DataRank(0, 1)
        return DataRank(self.trainer.global_rank, self.trainer.world_size, self.trainer.num_devices)
