"""Random numbers that belong to a sample, not to a process or a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b

import torch
from torch import Tensor

from ldm.types import send

Noise = Callable[[Tensor], Tensor]
"""``x (B, ...) -> standard normal`` of the same shape, dtype and device, fresh at every call.
``torch.randn_like`` is one, ``SampleNoise(seed, keys).like`` is another."""


class SampleNoise:
    """Streams of random numbers, one per sample, each a function of (seed, key) alone.

    So the numbers of a sample depend neither on the batch that it is in nor on the world size nor
    on the device. Every call moves all streams on: the same calls in the same order give the same
    numbers.

    Args:
        seed: Chooses the family of streams: a number, or a name such as "validation".
        keys: B names, one per sample. Equal names get equal numbers.
    """

    def __init__(self, seed: int | str, keys: Sequence[str]) -> None:
        self._seed, self._keys = seed, keys

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        """Made when the first numbers are drawn: a stage may need none."""
        return [torch.Generator().manual_seed(_stream_seed(self._seed, key)) for key in self._keys]

    def like(self, x: Tensor) -> Tensor:
        """Draw standard normal noise like ``x``.

        Args:
            x: (B, ...), one row per key; only shape, dtype and device matter.

        Returns:
            (B, ...) in the dtype and on the device of ``x``, drawn in float32 on the CPU.

        Raises:
            ValueError: If ``x`` does not have one row per key.
        """
        if len(x) != len(self._keys):
            raise ValueError(f"SampleNoise: expected {len(self._keys)} rows (one per key), got {len(x)}")
        drawn = torch.empty(x.shape, dtype=torch.float32)
        for row, generator in zip(drawn, self._generators, strict=True):
            row.normal_(generator=generator)
        return send(drawn, x.device).to(x.dtype)

    def uniform(self) -> Tensor:
        """Draw one number per sample.

        Returns:
            (B,) float32 in [0, 1), on the CPU.
        """
        return torch.stack([torch.rand((), generator=generator) for generator in self._generators])


def _stream_seed(seed: int | str, key: str) -> int:
    # hash() is salted per process; torch takes seeds up to 63 bits without a sign.
    return int.from_bytes(blake2b(f"{seed}/{key}".encode()).digest()[:8], "big") & (2**63 - 1)
