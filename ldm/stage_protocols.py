"""What else of the project may ask of a stage: protocols, each of one method or value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from ldm.types import Batch, ImageKind


@runtime_checkable
class ValidatesBatch(Protocol):
    """A stage that knows which values of a batch it cannot use."""

    def validate_batch(self, batch: Batch) -> None:
        """Check a batch that is still on the CPU, where reading values does not wait for the device.

        Raises:
            ValueError: If the stage cannot use it.
        """
        ...


@runtime_checkable
class ValidatesShards(Protocol):
    """A stage that knows which shards it cannot be trained on."""

    def validate_shards(
        self, fields: Collection[str], train: str | list[str], val: str | list[str], image_size: int
    ) -> None:
        """Check shards before anything of a run is written.

        Raises:
            ValueError: If the stage cannot use them.
        """
        ...


@runtime_checkable
class ValidatesImages(Protocol):
    """A stage that knows which kinds of images it can be trained on."""

    def validate_images(self, kind: ImageKind) -> None:
        """Check channels and bits of the images before anything of a run is written.

        Raises:
            ValueError: If the stage cannot use them.
        """
        ...


@runtime_checkable
class ValidatesSizes(Protocol):
    """A stage that knows which sizes of images it can be trained on."""

    def validate_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Check heights and widths of training images before the first step.

        Raises:
            ValueError: If the stage cannot use one.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """Optimizer steps and training samples, over all processes: the only count of them.

    Learning rate aside, whatever depends on how far training is reads it: ``progress_of`` a stage that
    trains, ``ldm.io.checkpoint.saved_progress`` of a checkpoint.
    """

    steps: int = 0
    """Complete optimizer steps."""
    samples: int = 0
    """Training samples of these steps, over all processes and accumulated batches."""


@runtime_checkable
class HasProgress(Protocol):
    """A stage, or another LightningModule that counts its steps (``ldm.stages.counted.Counted``)."""

    progress: Progress


def progress_of(module: object) -> Progress:
    """Return the progress of a module; no steps of one that does not count them."""
    return module.progress if isinstance(module, HasProgress) else Progress()


@runtime_checkable
class ExcludesParameters(Protocol):
    """A stage with trained parameters that serve training alone."""

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters that are averaged and exported, by name."""
        ...


@runtime_checkable
class ReadsFields(Protocol):
    """A stage that names the fields of a batch that it trains on, so that no others are loaded."""

    def reads(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields.

        Args:
            stored: Fields of the shards that replace those that they were computed from: "latent" and
                "text_embedding", where ``ldm.encode`` made them.
        """
        ...


@runtime_checkable
class ReadsCaptions(Protocol):
    """A stage that reads the tokens of captions, where ``context_length`` is not None."""

    context_length: int | None

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the tokens of each caption, begin and end marks included, read or cut."""
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """A stage whose captions can be turned to token ids before it gets them."""

    @property
    def tokenizer(self) -> Callable[[str], Sequence[int]] | None:
        """Function that the workers of the loader call, found by its name there; None without captions."""
        ...


@runtime_checkable
class HasClasses(Protocol):
    """A stage that reads classes: a sample with others is a bad one."""

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes of each field that holds some: they are 0 to one less."""
        ...


@runtime_checkable
class HasBlocks(Protocol):
    """A stage or a network that names its blocks, which are sharded, compiled or recomputed one by one."""

    def blocks(self) -> Iterable[nn.Module]:
        """Return modules that its forward calls, none inside another, with most of its parameters."""
        ...


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that a stage names, or else those that its networks name, each once."""
    if isinstance(module, HasBlocks):
        return list(module.blocks())
    return list(dict.fromkeys(block for child in module.children() for block in blocks_of(child)))
