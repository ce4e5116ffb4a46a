"""Shard tensors and modules over processes (FSDP2), and unshard them.

Each process holds a shard of every weight, as a DTensor; what is computed from weights element by element is
sharded alike. Functions that are called collective must be called by all processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds a shard of the module's weights only."""
    return isinstance(module, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, of any shape; collective if it is split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, in the same memory; all of it if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Take this process's shard of a full tensor that all processes have.

    Args:
        tensor: Any shape, on any device.
        like: A tensor of the same shape; if it is not split, nothing is.

    Returns:
        ``tensor``, split and placed like ``like``.
    """
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gather_full(tree: Any, keep: bool) -> Any:
    """Replace the sharded tensors in nested dicts and lists by full ones in main memory; collective.

    Args:
        tree: The same on all processes, but for the shards.
        keep: Whether this process gets the full tensors; another gets None, and needs no memory for them.
    """
    if isinstance(tree, DTensor):
        found = tree.full_tensor()
        return found.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gather_full(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gather_full(value, keep) for value in tree]
    return tree


def unshard(module: nn.Module) -> None:
    """Gather all weights on each process, until ``reshard``: to run forward any number of times; collective.

    Processes may then differ in how often they do. The weights are not to be written to.
    """
    with torch.inference_mode(False):  # training goes on with the same memory
        for unit in _units(module):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def reshard(module: nn.Module) -> None:
    """Keep this process's shard of the weights only; not collective. Others stay as they are."""
    for unit in _units(module):
        unit.set_reshard_after_forward(unit is not module, recurse=False)
        unit.reshard()


def half_context(module: nn.Module) -> torch.autocast:
    """Compute with the weights as they are now: under autocast where they are gathered in bfloat16."""
    weight = next((p for p in module.parameters() if p.dtype == torch.bfloat16), None)
    kind = "cpu" if weight is None else weight.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=weight is not None)


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (unit for unit in module.modules() if isinstance(unit, FSDPModule))
