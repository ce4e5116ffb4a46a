"""Collective operations: all-reduce, gather and broadcast, in one process too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8)
"""Values that can be gathered."""


class Group(ABC):
    """Collective operations, which all processes must call in the same order."""

    rank: int
    world: int

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add a tensor of one shape up over all processes, and return the sum, on the CPU, to each."""

    @abstractmethod
    def gather(self, rows: Tensor) -> Tensor:
        """Bring the rows (n, F) or numbers (n,) of all processes to the first, in order of the processes.

        The processes may have different n, and one without rows need not know F or the dtype.

        Returns:
            (sum of n, F) or (sum of n,) on the CPU at the first process; nothing elsewhere.
        """

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """Return the first process's value to each."""


class SingleProcess(Group):
    """One process."""

    rank = 0
    world = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor.cpu()

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows.cpu()

    def broadcast(self, value: T) -> T:
        """Return the value."""
        return value


class ProcessGroup(Group):
    """The processes of torch.distributed's default group.

    Args:
        device: Where its backend needs tensors: cuda for NCCL, cpu for Gloo.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Add up by all-reduce; the caller's tensor stays as it is."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, rows: Tensor) -> Tensor:
        """Collect rows, padded on their way to the largest number."""
        counts, like = self._sizes(rows)
        if not any(counts):
            return like
        padded = like.new_zeros(max(counts), *like.shape[1:], device=self.device)
        if len(rows):
            padded[: len(rows)] = rows.to(padded)
        gathered = [torch.empty_like(padded) for _ in counts] if self.rank == 0 else None
        dist.gather(padded, gathered)
        if gathered is None:
            return like
        return torch.cat([rows[:n].cpu() for rows, n in zip(gathered, counts, strict=True)])

    def broadcast(self, value: T) -> T:
        """Broadcast by pickle, among processes of the same program."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device(self.device))
        return box[0]

    def _sizes(self, rows: Tensor) -> tuple[list[int], Tensor]:
        """Return each process's number of rows, and an empty tensor of their width and dtype."""
        width = rows.shape[1] if rows.ndim == 2 else 0
        mine = torch.tensor([len(rows), width, DTYPES.index(rows.dtype)], device=self.device)
        sizes = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(sizes, mine)
        table = torch.stack(sizes).tolist()
        _, width, dtype = max(table)  # of the process with most rows
        return [row[0] for row in table], torch.empty(0, *([width] if width else []), dtype=DTYPES[dtype])


def default_group(device: torch.device | str) -> Group:
    """Return the processes of torch.distributed if it runs, or else this one alone."""
    return ProcessGroup(device) if dist.is_available() and dist.is_initialized() else SingleProcess()
