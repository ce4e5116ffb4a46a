"""Tensors of samples to the tensor of a batch, with as few copies as can be.

``BatchMemory`` is there before the samples: their images are decoded into its slots, and ``stack`` finds that
these are a batch already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

Sample = dict[str, Any]


class Slot:
    """Memory in a batch for one value of a sample.

    Args:
        value: The tensor (C, H, W).
        pixels: The same memory as rows of pixels, (H, W, C).
    """

    def __init__(self, value: Tensor, pixels: np.ndarray) -> None:
        self.value, self.pixels = value, pixels
        self.job: Callable[[], object] | None = None

    def takes(self, *shape: int) -> bool:
        """Whether it is memory without gaps for pixels of a shape (H, W, C), 8 bits each."""
        pixels = self.pixels
        return pixels.shape == shape and pixels.dtype == np.uint8 and pixels.flags.c_contiguous

    def later(self, job: Callable[[], object]) -> Tensor:
        """Put off what fills it until all samples of the batch are read; return its value."""
        self.job = job
        return self.value


Slots = Mapping[str, Slot]
"""Field to the memory of its value."""
NO_SLOTS: Slots = {}


def read_batch(read: Callable[[int, Slots], Sample], positions: Sequence[int]) -> list[Sample]:
    """Read the samples of a batch into its memory.

    What is put off is decoded at last, one image after the other: with the work on all else in between, the
    processor's caches would forget both.

    Args:
        read: Reads the sample at a position, if need be without the memory that it is given.
        positions: Where they are.
    """
    memory = BatchMemory(len(positions))
    samples = [memory.keep(k, read(position, memory.slots(k))) for k, position in enumerate(positions)]
    for k in memory.decode():
        samples[k] = memory.keep(k, read(positions[k], NO_SLOTS))
    return samples


class BatchMemory:
    """One tensor for each field of images or latents, in a worker in memory that it shares.

    The first sample says what shape, type and layout its slots have. A value that differs stays where it is.

    Args:
        num: B, samples of the batch.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._slots: list[Slots] = []

    def slots(self, k: int) -> Slots:
        """Return the memory of sample k: none for the first one."""
        return self._slots[k] if self._slots else NO_SLOTS

    def keep(self, k: int, sample: Sample) -> Sample:
        """Move to their slots those values of sample k that are not there."""
        if not self._slots:
            fields = {name: _like(value, self._num) for name, value in sample.items() if _is_image(value)}
            self._slots = [{name: slots[n] for name, slots in fields.items()} for n in range(self._num)]
        for name, slot in self._slots[k].items():
            value = sample.get(name)
            if value is not slot.value:
                slot.job = None
                if isinstance(value, Tensor) and _kind(value) == _kind(slot.value):
                    sample[name] = slot.value.copy_(value)
        return sample

    def decode(self) -> list[int]:
        """Do what was put off; return the samples of which it failed."""
        failed = []
        for k, slots in enumerate(self._slots):
            try:
                for slot in slots.values():
                    if slot.job is not None:
                        slot.job()
            except (RuntimeError, ValueError):
                failed.append(k)
        return failed


def stack(values: list[Tensor]) -> Tensor:
    """Stack tensors of one shape, in a worker in memory that it shares: no further copy follows.

    Slots of a ``BatchMemory`` are not copied. Images (C, H, W) whose channels are last in memory stay so.
    """
    first, size = values[0], values[0].nbytes
    follow = (value.data_ptr() == first.data_ptr() + k * size for k, value in enumerate(values))
    if first.untyped_storage().nbytes() == len(values) * size and all(follow):
        return first.as_strided((len(values), *first.shape), (first.numel(), *first.stride()))
    if first.ndim != 3 or first.is_contiguous():
        return cast(Tensor, default_collate(values))
    return cast(Tensor, default_collate([value.permute(1, 2, 0) for value in values]).permute(0, 3, 1, 2))


def _like(value: Tensor, num: int) -> list[Slot]:
    """Make the memory of ``num`` tensors like ``value``, which has no gaps."""
    is_worker = get_worker_info() is not None
    storage = (torch.UntypedStorage._new_shared if is_worker else torch.UntypedStorage)(num * value.nbytes)
    shape, strides = (num, *value.shape), (value.numel(), *value.stride())
    whole = torch.empty(0, dtype=value.dtype).set_(storage, 0, shape, strides)
    return [Slot(*each) for each in zip(whole, whole.permute(0, 2, 3, 1).numpy(), strict=True)]


def _is_image(value: Any) -> bool:
    """Whether a value is a tensor (C, H, W) without gaps."""
    if not isinstance(value, Tensor) or value.ndim != 3:
        return False
    steps = zip(value.shape, value.stride(), strict=True)
    return 1 + sum((n - 1) * step for n, step in steps) == value.numel()


def _kind(value: Tensor) -> tuple[torch.dtype, torch.Size]:
    return value.dtype, value.shape
