"""Bytes that a forward pass keeps for the backward pass, counted storage by storage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Storages:
    """Memory that is kept, each storage once.

    Args:
        own: Addresses of storages that do not count.
    """

    def __init__(self, own: Collection[int]) -> None:
        self.own, self.found = own, dict[int, torch.UntypedStorage]()

    def keep(self, tensor: Tensor) -> Tensor:
        """Count the storage of a tensor, and return the tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.found[storage._cdata] = storage  # alive: an address is not used twice
        return tensor

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Count what operators keep for the backward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(storage.nbytes() for storage in self.found.values())


def kept(
    step: Callable[[], Tensor], weights: Iterable[Tensor], recomputed: Sequence[nn.Module] = ()
) -> list[int]:
    """Count the bytes that a forward pass keeps for the backward pass, weights not.

    Args:
        step: The forward pass.
        weights: What is there anyway.
        recomputed: Blocks that are computed again in the backward pass (``ActivationCheckpointing``): of
            each, the inputs are kept.

    Returns:
        What is kept, and what is added while each of the blocks, in order, is computed again.
    """
    all_kept = Storages({weight.untyped_storage()._cdata for weight in weights})
    again: list[int] = []

    def counted(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                all_kept.keep(value)
        inside = Storages({*all_kept.own, *all_kept.found})
        with inside.hooks():
            result = forward(*args, **kwargs)
        again.append(inside.nbytes)
        return result

    forwards = [block.forward for block in recomputed]
    for block in recomputed:
        block.forward = partial(counted, block.forward)
    try:
        with all_kept.hooks():
            step()
    finally:
        for block, forward in zip(recomputed, forwards, strict=True):
            block.forward = forward
    return [all_kept.nbytes, *again]
