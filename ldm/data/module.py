"""The one data module of all stages: shards in, batches out, and an exact place to continue from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.decode import FIELDS, Field, Sample
from ldm.data.readers import Indexed, Reader
from ldm.data.source import DataRank, EvaluationSet, Source, Spec
from ldm.data.streaming import Streaming
from ldm.io.images import from_bytes
from ldm.types import Batch, ValidatesBatch

__all__ = ["Indexed", "Shards", "Streaming"]

_FROM_BYTES: dict[str, Callable[[Tensor], Tensor]] = {
    "image": from_bytes,
    "low_res": from_bytes,
    "mask": Tensor.float,
    "label_map": Tensor.long,
}


class Shards(L.LightningDataModule):
    """Reads tar shards (data/README.md) for training and validation.

    Training is endless and, with the ``Indexed`` reader, a pure function of the global seed: the same
    samples in the same global order at any number of processes and workers, continued at the exact sample.
    Validation reads each sample once, in order, without padding.

    Args:
        train: Training shards: paths with braces (``train-{000000..000019}.tar``) or globs, one or a list.
        val: Validation shards, likewise.
        image_size: Side of the square images in pixels; others are cropped and resized.
        batch_size: Samples per batch and process.
        num_workers: Processes that read and decode; 0 reads in the training process.
        reader: ``Indexed`` (local files, exact) or ``Streaming`` (webdataset's pipeline, also URLs).
        fields: What training samples load: any of image, text, label, latent, mask, low_res, label_map,
            layout. Validation always loads the image and everything else the shards have.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str],
        image_size: int,
        batch_size: int,
        num_workers: int = 0,
        reader: Reader = Indexed(),  # noqa: B008  (stateless)
        fields: Sequence[Field] = ("image", "text"),
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        _check_at_least("image_size", image_size, 1)
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("num_workers", num_workers, 0)
        self.train_shards, self.val_shards = train, val
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.reader = reader
        self.fields = _checked_fields(fields)
        self._source: Source | None = None
        self._evaluation: EvaluationSet | None = None
        self._base = {"samples": 0, "batches": 0}
        self._seed = 0
        self._bad: dict[str, int] = {}

    @property
    def num_train(self) -> int | None:
        """Training samples of an epoch; None if the reader does not know."""
        return self.source.num_samples

    @property
    def num_val(self) -> int:
        """Validation samples."""
        return len(self.evaluation)

    @property
    def num_skipped(self) -> int:
        """Bad training samples met by this process and replaced."""
        return sum(self._bad.values())

    @property
    def samples(self) -> int:
        """Training samples processed, over all processes and since the beginning of the run."""
        batches = self._batches() - self._base["batches"]
        return self._base["samples"] + batches * self.batch_size * self._place().world

    @property
    def source(self) -> Source:
        """The training samples; opened on first use."""
        if self._source is None:
            self._seed = _global_seed()
            spec = Spec(self.fields, self.image_size, self._seed)
            self._source = self.reader.open(self.train_shards, spec)
        return self._source

    @property
    def evaluation(self) -> EvaluationSet:
        """The validation samples; opened on first use."""
        if self._evaluation is None:
            spec = Spec(("image",), self.image_size, _global_seed())
            self._evaluation = self.reader.evaluation(self.val_shards, spec)
        return self._evaluation

    def prepare_data(self) -> None:
        """Index the shards, on the first process alone, before others ask for them."""
        self.reader.prepare(self.train_shards, self.val_shards)

    def setup(self, stage: str) -> None:
        """Open the shards and check them against the configuration.

        Raises:
            FileNotFoundError: If a pattern matches nothing.
            ValueError: If shards are broken or lack a field, or if they are fewer samples than a batch.
        """
        world = self._place().world
        if self._batches() == 0:  # a new trainer, whose checkpoint, if any, is read after this
            self._base = {"samples": 0, "batches": 0}
        if stage == "fit" and self.num_train is not None and self.batch_size * world > self.num_train:
            processes = f" x {world} processes" if world > 1 else ""
            raise ValueError(
                f"data.batch_size: {self.batch_size}{processes} is more than the {self.num_train} samples of "
                "data.train, expected at most as many"
            )
        if self.num_val < world:
            raise ValueError(f"data.val: {self.num_val} samples for {world} processes, expected one for each")

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the endless loader of this process; it begins after the samples processed so far."""
        return self.source.loader(lambda: self.samples, self.batch_size, self.num_workers, self._place())

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the loader of this process's part of the validation samples."""
        return self.evaluation.loader(self.batch_size, self.num_workers, self._place())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Take out of a batch what concerns the reader only, report bad samples, let the stage look at it."""
        for message in batch.pop("skipped", ()):
            if message not in self._bad:
                warnings.warn(f"bad training sample replaced: {message}", stacklevel=1)
            self._bad[message] = self._bad.get(message, 0) + 1
        if self.trainer is not None and self.trainer.training:
            self.source.observe(batch)
        if self.trainer is not None and isinstance(self.trainer.lightning_module, ValidatesBatch):
            self.trainer.lightning_module.check(batch)
        return cast(Batch, batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Turn images, masks and maps from uint8 into what ``Batch`` says, on the device."""
        return decoded(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands and what its order depends on: primitives only."""
        return {
            "data": self.source.identity(),
            "seed": self._seed,
            "samples": self.samples,
            "batches": self._batches(),
            "batches_per_step": self._batches_per_step(),
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; batch size, processes and workers may have changed.

        Raises:
            ValueError: If the seed, the training data or the reader is another one.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        found = self.source.identity()
        for name, then in state["data"].items():
            if found.get(name) != then:
                raise ValueError(
                    f"data.train: the checkpoint was trained on data with {name} {then!r:.120}, found "
                    f"{found.get(name)!r:.120}: restore the data, or start a new run"
                )
        if state["seed"] != self._seed:
            raise ValueError(
                f"seed_everything: the checkpoint was trained with seed {state['seed']}, found {self._seed}: "
                "restore the seed, or start a new run"
            )
        batches, now = int(state["batches"]), self._batches_per_step()
        if (then := state.get("batches_per_step", now)) != now:
            batches = batches // then * now  # as the stage counts them from now on
        self._base = {"samples": int(state["samples"]), "batches": batches}
        self.source.load_state_dict(state["source"])

    def teardown(self, stage: str) -> None:
        """Sum up the bad samples."""
        if stage == "fit" and self._bad:
            warnings.warn(
                f"{self.num_skipped} bad training samples were replaced ({len(self._bad)} different ones)",
                stacklevel=1,
            )

    def _place(self) -> DataRank:
        if self.trainer is None:
            return DataRank(0, 1)
        return DataRank(self.trainer.global_rank, self.trainer.world_size)

    def _batches_per_step(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _batches(self) -> int:
        """Count the batches this process has trained on, by the only counter of Lightning that is exact.

        ``ready`` runs ahead (prefetching, a batch that failed), ``completed`` lags inside on_train_batch_end.
        """
        if self.trainer is None:
            return self._base["batches"]
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)


def decoded(batch: Batch) -> Batch:
    """Turn images, masks and maps of a batch from uint8 into what ``Batch`` says, where they are."""
    found = cast(dict[str, Any], dict(batch))
    for name, convert in _FROM_BYTES.items():
        if name in found and found[name].dtype == torch.uint8:
            found[name] = convert(found[name])
    return cast(Batch, found)


def _global_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def _checked_fields(fields: Sequence[Field]) -> tuple[Field, ...]:
    if not fields or not set(fields) <= set(FIELDS):
        raise ValueError(f"data.fields: got {list(fields)}, expected some of {', '.join(FIELDS)}")
    return tuple(fields)


def _check_at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ValueError(f"data.{name}: got {value}, expected at least {lowest}")
