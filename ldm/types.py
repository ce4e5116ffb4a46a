"""The vocabulary of the project. Read this first; it imports torch and nothing else of ours.

Shapes use one alphabet: ``B`` samples, ``(B, 3, H, W)`` images, ``(B, C, h, w)`` latents,
``(B, L, D)`` tokens. Images are float32 in [-1, 1]; latents have a standard deviation close to 1.
Where ``ImageKind`` declares it, images have 1 or 4 channels in place of 3, and 16 bits in place of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, Self, TypedDict, runtime_checkable

import torch
from torch import Tensor


class Batch(TypedDict, total=False):
    """A batch of samples for any stage. A field that the shards lack is absent."""

    key: list[str]
    """Names of the samples, unique over the data set; per-sample random numbers derive from them."""
    index: Tensor
    """(B,) int64 on the CPU: positions of the samples in the evaluated set, over all processes."""
    image: Tensor
    """(B, 3, H, W) float32 in [-1, 1] on the device (uint8 in [0, 255] until it is there, or uint16)."""
    text: list[str]
    """Captions. Text stays text until it meets the module that owns the tokenizer; workers of the loader may
    have made the ids beforehand, see ``Caption``."""
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


class Caption(str):
    """A caption with its token ids, as a worker of the loader made them; a str to all who do not know.

    Args:
        text: The caption.
        ids: Its token ids, all of them.
    """

    __slots__ = ("ids",)
    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> Self:
        """Make a str, whose value is set here."""
        self = super().__new__(cls, text)
        self.ids = tuple(ids)
        return self

    def __reduce__(self) -> tuple[type[Caption], tuple[str, tuple[int, ...]]]:
        """Travel to another process with the ids."""
        return type(self), (str(self), self.ids)


@dataclass(frozen=True)
class ImageKind:
    """Channels and bits of the images of a data set, and what becomes of files of another kind.

    Values are mapped linearly: 0 is -1, the highest of the bits is 1.

    Args:
        channels: 1 (grey), 3 (RGB) or 4. The fourth is a channel like the others, which files hold where
            alpha lies: alpha, near infrared, depth ... Grids show the first three.
        bits: Of each channel, 8 or 16.
        convert: "exact" converts a file only where nothing is lost or made up: grey to RGB, RGB of equal
            channels to grey, 8 to 16 bits (times 257) and back, alpha that is opaque everywhere; others are
            bad samples. "any" also takes the luma of colours, rounds to 8 bits, lays alpha over white and
            adds an opaque fourth channel. None is "any" for 3 channels of 8 bits, "exact" for others.

    Raises:
        ValueError: If there is no such kind.
    """

    channels: Literal[1, 3, 4] = 3
    bits: Literal[8, 16] = 8
    convert: Literal["exact", "any"] | None = None

    def __post_init__(self) -> None:
        if self.channels not in CHANNELS or self.bits not in BITS:
            raise ValueError(
                f"data.image: got {self.channels} channels of {self.bits} bits, expected 1, 3 or 4 of 8 or 16"
            )

    @property
    def is_exact(self) -> bool:
        """Whether files are converted only where nothing is lost."""
        return self.convert == "exact" or (self.convert is None and (self.channels, self.bits) != (3, 8))

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel."""
        return self.channels * self.bits // 8

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.bits} bits"


CHANNELS, BITS = (1, 3, 4), (8, 16)
RGB8 = ImageKind()
"""What images are unless something else is declared."""


def kind_of_channels(channels: int) -> ImageKind | None:
    """Return the kind of images with so many channels of 8 bits; None if files hold none such."""
    return ImageKind(channels) if channels in CHANNELS else None  # type: ignore[arg-type]


def fitting(image: Tensor, network: object, reader: str) -> Tensor:
    """Give images to a network as it takes them: RGB, unless it says ``image_channels``.

    Args:
        image: (B, C, H, W); grey, C = 1, is repeated.
        network: The network.
        reader: Its name in messages.

    Raises:
        ValueError: If it takes another number of channels: nobody knows which of them are colours.
    """
    wanted = int(getattr(network, "image_channels", None) or 3)
    if image.shape[1] not in (1, wanted):
        raise ValueError(
            f"{reader}: takes images of {wanted} channels, or grey, got {image.shape[1]}: leave it out, or "
            "name a network of your own that has image_channels"
        )
    return image.expand(-1, wanted, -1, -1)


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
"""``(x_t (B, C, h, w), t (B,)) -> x0_hat (B, C, h, w)``. Samplers and guidance see nothing else. One of a
learned variance gives (B, 2 C, h, w); one with two ``times`` gives (B, 2), those before and after a step."""


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
            (B, 3, H, W) float32 in [-1, 1], with as many channels as the images it was trained on.
        """
        ...


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
