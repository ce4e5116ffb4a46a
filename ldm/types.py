"""The vocabulary of the project. Read this first; it imports torch and nothing else of ours.

Shapes use one alphabet: ``B`` samples, ``(B, 3, H, W)`` images, ``(B, C, h, w)`` latents,
``(B, L, D)`` tokens. Images are float32 in [-1, 1]; latents have a standard deviation close to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn


class Batch(TypedDict, total=False):
    """A batch of samples for any stage. A field that the shards lack is absent."""

    key: list[str]
    """Names of the samples, unique over the data set; per-sample random numbers derive from them."""
    index: Tensor
    """(B,) int64 on the CPU: positions of the samples in the evaluated set, over all processes."""
    image: Tensor
    """(B, 3, H, W) float32 in [-1, 1] on the device (uint8 in [0, 255] until it is there)."""
    text: list[str]
    """Captions. Text stays text until it meets the module that owns the tokenizer."""
    text_embedding: list[Tensor]
    """B times (n, D): tokens of the captions by the text encoder that ``ldm.encode`` stored them with."""
    negative_text: list[str]
    """Captions to guide away from, in sampling: the null condition is of them instead of empty ones."""
    label: Tensor
    """(B,) int64 class labels."""
    latent: Tensor
    """(B, 2 C, h, w) float32: mean and standard deviation of q(z | image), unscaled (``ldm.encode``)."""
    mask: Tensor
    """(B, 1, H, W) float32, 1 = to be painted, 0 = known (uint8 until it is on the device)."""
    low_res: Tensor
    """(B, 3, h', w') float32 in [-1, 1]: the image in low resolution (uint8 until it is on the device)."""
    label_map: Tensor
    """(B, H, W) int64: the class of every pixel (uint8 until it is on the device)."""
    layout: list[Tensor]
    """B times (n, 5) float32: class, left, top, right, bottom of each object, in fractions of the sides."""
    size: Tensor
    """(B, 6) float32, pixels: height and width of the image before anything was resized, top and left of the
    crop in the resized image, height and width of the crop."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; to a GPU without waiting for the work that is queued there."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Cond:
    """Condition of a denoiser. Every field is optional; a field that is None conditions nothing."""

    tokens: Tensor | None = None
    """(B, L, D) sequence for cross-attention."""
    mask: Tensor | None = None
    """(B, L) bool, True = attend. None attends to all tokens."""
    vector: Tensor | None = None
    """(B, E) added to the timestep embedding."""
    spatial: Tensor | None = None
    """(B, C', h, w) concatenated to the noisy latent."""

    def where(self, keep: Tensor, null: Cond) -> Cond:
        """Take this condition where ``keep`` is True and ``null`` elsewhere: the only condition dropout.

        Args:
            keep: (B,) bool, on any device.
            null: The null condition with the same fields set.

        Raises:
            ValueError: If one of the two has a field that the other lacks.
        """
        picked = {}
        for name, ours, theirs in self._with(null):
            kept, shape = send(keep, ours.device), (-1,) + (1,) * (ours.ndim - 1)
            picked[name] = torch.where(kept.view(shape), ours, theirs.to(ours.dtype))
        return Cond(**picked)

    def concat(self, other: Cond) -> Cond:
        """Put another condition's samples after those of this one.

        Args:
            other: A condition with the same fields set.

        Raises:
            ValueError: If one of the two has a field that the other lacks.
        """
        joined = {}
        for name, ours, theirs in self._with(other):
            joined[name] = torch.cat([ours, theirs.to(ours.dtype)])
        return Cond(**joined)

    def _with(self, other: Cond) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name and the two values of each field that is set."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if (ours is None) != (theirs is None):
                raise ValueError(f"Cond: only one of condition and null condition has '{field.name}'")
            if ours is not None:
                yield field.name, ours, theirs


class Denoiser(Protocol):
    """The network of a diffusion model, as its objective calls it: all that the mathematics knows of one."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, /) -> Tensor:
        """Return the raw output, which the objective's prediction turns into x0_hat.

        Args:
            x_t: (B, C, h, w), the noisy latent, scaled by the prediction: of unit variance with ``EDM``,
                x_t itself with the others.
            t: (B,), how noisy each sample is: timesteps, int64 in [0, T - 1], 0 almost clean, or float32
                between them; with ``EDM`` the float32 c_noise = ln(sigma / alpha) / 4, which may be negative.
                An objective with two times, as ``DenoiserDims.times`` says, gives (B, 2).
            cond: What conditions the B samples, with the fields that ``DenoiserDims`` announced.

        Returns:
            (B, C, h, w), or as many channels as ``DenoiserDims.output`` says, of any floating dtype: the
            objective computes in float32.
        """
        ...


Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, C, h, w), t (B,)) -> x0_hat (B, C, h, w)``. Samplers and guidance see nothing else. One that
``reads_variance`` gets (B, 2 C, h, w); one with two ``times`` gives (B, 2), those before and after a step."""


class Conditional(Protocol):
    """A model that estimates x0 with a condition and without."""

    def cond(self, batch: Batch) -> Denoise:
        """Condition on the B samples of ``batch``."""
        ...

    def uncond(self, batch: Batch) -> Denoise:
        """Condition on nothing, for B samples of the same shapes."""
        ...

    def cond_and_uncond(self, batch: Batch) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Condition on ``batch`` and on nothing: what ``cond`` and ``uncond`` give, in one pass."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A stage that makes images: diffusion samples, the autoencoder reconstructs."""

    def generate(self, batch: Batch, seed: int) -> Tensor:
        """Make one image per sample of ``batch``.

        The random numbers of a sample are a function of (seed, key) alone, so any split of a
        set over batches and processes draws the same images.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].
        """
        ...


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


@dataclass(frozen=True)
class DenoiserDims:
    """Channels and widths of a denoiser, which the stage derives from its latent space and conditioner."""

    sample: int
    """C: channels of x_t and of the output."""
    tokens: int | None = None
    """D: width of ``Cond.tokens``; None without tokens."""
    vector: int | None = None
    """E: width of ``Cond.vector``; None without a vector."""
    spatial: int = 0
    """C': channels of ``Cond.spatial``; 0 without it."""
    output: int | None = None
    """Channels of the output; None: C. An objective that learns the variance wants 2 C."""
    times: int = 1
    """Times that the network gets: 1, then t is (B,); or 2, then it is (B, 2)."""

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.sample if self.output is None else self.output
