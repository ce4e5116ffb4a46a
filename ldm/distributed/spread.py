"""Spread work on matrices over processes: each computes a share of them, and all get the results."""

from __future__ import annotations

import heapq
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

Work = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Makes matrices (rows, columns) out of as many, of the same shapes."""


def share_out(costs: Sequence[float], num: int) -> list[list[int]]:
    """Give each task to the process that has least to do so far, the largest first (Graham 1969).

    Args:
        costs: Of the tasks.
        num: Processes.

    Returns:
        The tasks of each process, in ascending order: the same in all processes.
    """
    loads = [(0.0, process) for process in range(num)]
    shares: list[list[int]] = [[] for _ in range(num)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, process = heapq.heappop(loads)
        shares[process].append(i)
        heapq.heappush(loads, (load + costs[i], process))
    return [sorted(share) for share in shares]


class Spread(ABC):
    """How work on matrices is spread; what is called must be called by all processes alike."""

    @abstractmethod
    def run(self, matrices: Sequence[Tensor], costs: Sequence[float], work: Work) -> Sequence[Tensor]:
        """Have all matrices worked on.

        Args:
            matrices: What this process has of each: all of it, or the rows that it holds.
            costs: Of the work on each, the same in all processes.
            work: Gets whole matrices in any number.

        Returns:
            What this process needs of the results: as many rows of each.
        """


class Alone(Spread):
    """One process."""

    @override
    def run(self, matrices: Sequence[Tensor], costs: Sequence[float], work: Work) -> Sequence[Tensor]:
        return work(matrices)


class Replicated(Spread):
    """Processes that have all matrices: each sends the results of its share to all.

    Args:
        group: The processes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @override
    def run(self, matrices: Sequence[Tensor], costs: Sequence[float], work: Work) -> Sequence[Tensor]:
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        shares = share_out(costs, world)
        length = max(sum(matrices[i].numel() for i in share) for share in shares)
        mine = matrices[0].new_empty(length)
        _pack(work([matrices[i] for i in shares[rank]]), mine)
        found = mine.new_empty(world, length)
        dist.all_gather(list(_raw(found)), _raw(mine), self.group)
        results = list(matrices)
        for share, row in zip(shares, found, strict=True):
            shapes = [matrices[i].shape for i in share]
            for i, result in zip(share, _unpack(row, shapes), strict=True):
                results[i] = result
        return results


class Sharded(Spread):
    """Processes that hold rows of each matrix: its owner gets them all, and sends those of the result back.

    Args:
        group: The processes, in the order of their rows.
        num_rows: Of each matrix, in all processes together; they are split as torch.chunk does.
    """

    def __init__(self, group: dist.ProcessGroup, num_rows: Sequence[int]) -> None:
        self.group = group
        self.num_rows = num_rows

    @override
    def run(self, matrices: Sequence[Tensor], costs: Sequence[float], work: Work) -> Sequence[Tensor]:
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        shares = share_out(costs, world)
        held = [
            [
                (_num_rows(rows, process, world), x.shape[1])
                for rows, x in zip(self.num_rows, matrices, strict=True)
            ]
            for process in range(world)
        ]
        here = [[held[rank][i] for i in share] for share in shares]  # by owner
        there = [[held[process][i] for i in shares[rank]] for process in range(world)]  # by holder
        rows = self._exchange([[matrices[i] for i in share] for share in shares], there, matrices[0])
        whole = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        results = [
            result.split([rows[0] for rows in sizes])
            for result, sizes in zip(work(whole), zip(*there, strict=True), strict=True)
        ]
        back = self._exchange([[r[process] for r in results] for process in range(world)], here, matrices[0])
        found = {
            i: x for share, parts in zip(shares, back, strict=True) for i, x in zip(share, parts, strict=True)
        }
        return [found[i] for i in range(len(matrices))]

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send each process its matrices, and return what each sent here, of these shapes."""
        sends = [sum(x.numel() for x in tensors) for tensors in sent]
        receives = [sum(rows * columns for rows, columns in expected) for expected in shapes]
        outgoing, incoming = like.new_empty(sum(sends)), like.new_empty(sum(receives))
        _pack([x for tensors in sent for x in tensors], outgoing)
        size = like.element_size()
        dist.all_to_all_single(
            _raw(incoming),
            _raw(outgoing),
            [n * size for n in receives],
            [n * size for n in sends],
            self.group,
        )
        parts = incoming.split(receives)
        return [_unpack(part, expected) for part, expected in zip(parts, shapes, strict=True)]


def spread_over(parameters: Sequence[Tensor], node: Callable[[], dist.ProcessGroup | None]) -> Spread:
    """Choose how work on parameters is spread.

    Args:
        parameters: DTensors whose rows are split along the last dimension of their mesh, or all of each.
        node: Returns processes that have the same parameters, or None: this one alone.
    """
    first = parameters[0]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        return Sharded(mesh.get_group(mesh.ndim - 1), [p.shape[0] for p in parameters])
    group = node()
    return Alone() if group is None else Replicated(group)


def node_group() -> dist.ProcessGroup | None:
    """Group the processes of each node; None if this process is alone on its own. Collective.

    What crosses the network between nodes costs more than what the processes of one node save together.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    nodes = [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]
    groups: list[Any] = [dist.new_group(node) for node in nodes]
    node = next(i for i, node in enumerate(nodes) if dist.get_rank() in node)
    return groups[node] if len(nodes[node]) > 1 else None


def _num_rows(total: int, process: int, world: int) -> int:
    """Return how many rows a process holds, as torch.chunk splits them."""
    size = -(-total // world)
    return max(0, min(size, total - process * size))


def _pack(matrices: Sequence[Tensor], into: Tensor) -> None:
    views = _unpack(into, [x.shape for x in matrices])
    if views:
        torch._foreach_copy_(views, list(matrices))


def _unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [rows * columns for rows, columns in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _raw(tensor: Tensor) -> Tensor:
    """View numbers as bytes, which every backend sends whatever they are."""
    return tensor.view(torch.uint8)
