"""Memory of a training step on a GPU, counted on one that is not there (torch's fake tensors)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from benchmarks.plan.samples import samples
from benchmarks.plan.storages import kept
from ldm.nets.frozen import Frozen
from ldm.optim.muon import MuonOptimizer
from ldm.rng import SampleNoise
from ldm.stage_protocols import blocks_of
from ldm.stages.stage import Stage

GIB = 2**30
SIZES = (2, 4, 8)
"""Batches that are counted."""
Counts = tuple[int, int, int]
"""Bytes at these batches."""
USABLE = 0.9
"""Part of a card's memory that tensors fill: the rest is CUDA's own, workspaces and what is fragmented."""


UNKNOWN: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.pin_memory: lambda x: x,
    Tensor.__int__: lambda x: 0,
    Tensor.numpy: lambda x: np.zeros(x.shape, np.int64),
    Tensor.nonzero: lambda x: tuple(x.new_zeros(x.numel(), dtype=torch.int64) for _ in x.shape),  # all are
}
"""What is answered where a fake tensor has no value."""


class OnGPU(TorchFunctionMode):
    """Has attention computed by the operator that GPUs have for it, which keeps no pairs of positions."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return _flash(*args, **(kwargs or {}))
        if func in UNKNOWN and isinstance(args[0], FakeTensor):
            return UNKNOWN[func](args[0])
        return func(*args, **(kwargs or {}))


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0, is_causal: bool = False
) -> Tensor:
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, is_causal)[0]
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, p, is_causal)[0]


@contextmanager
def autocast(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """Switch autocast on, on a GPU that is not there too; torch.autocast would switch it off."""
    torch.set_autocast_enabled(kind, dtype != torch.float32)
    torch.set_autocast_dtype(kind, torch.bfloat16 if dtype == torch.float32 else dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, False)
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Args:
        weights: Trained parameters.
        frozen: Of networks that are not trained.
        moments: Of the optimizer.
        average: Of the weights.
        activations: At batches of ``SIZES``: what grows with the batch, and with its square.
        blocks: What is added while one of these is computed again in the backward pass, likewise.
        again: Activations of a part of the batch that is computed again in the backward pass.
    """

    weights: int
    frozen: int
    moments: int
    average: int
    activations: Counts
    blocks: tuple[Counts, ...] = ()
    again: int = 0

    @property
    def fixed(self) -> int:
        """Of weights, gradients, moments, average and frozen networks."""
        return 2 * self.weights + self.moments + self.average + self.frozen

    def kept(self, batch: int) -> int:
        """Return what the forward pass of a batch keeps."""
        block = max((parabola(counts, batch) for counts in self.blocks), default=0)
        return self.again + parabola(self.activations, batch) + block

    def largest(self, card: float) -> int:
        """Return the largest batch for a card of so many GiB; 0 if none fits."""
        low, high = 0, 2**20
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.fixed + self.kept(middle) <= USABLE * card * GIB
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def parabola(counts: Counts, batch: int) -> int:
    """Extrapolate counts at ``SIZES`` to another batch."""
    (a, b, c), (first, second, third) = SIZES, counts
    slope = (second - first) / (b - a)
    square = max(0.0, ((third - second) / (c - b) - slope) / (c - a))  # of pairs of samples
    return round(first + slope * (batch - a) + square * (batch - a) * (batch - b))


@contextmanager
def absent_gpu() -> Iterator[torch.device]:
    """Let torch compute shapes and dtypes only, as on a GPU, in the ``with`` block."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda")


def place(stage: nn.Module, device: torch.device) -> None:
    """Give a stage and its frozen networks weights on a device, without values, as training lays them out."""

    def empty(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        return torch.empty_like(tensor, device=device, memory_format=layout)

    stage._apply(empty)  # frozen modules follow, but for those of loss terms
    for network in frozen_networks(stage):
        if next(network.parameters()).is_meta:
            network._apply(empty)


def measure(
    stage: Stage, side: int, dtype: torch.dtype, device: torch.device, recomputes: bool = False
) -> Memory:
    """Count the memory of a training step.

    Args:
        stage: On ``device``.
        side: Of the images.
        dtype: What it computes in.
        device: One that is not there, or the CPU.
        recomputes: Whether blocks are computed again in the backward pass.

    Raises:
        ValueError: If training reads a field of samples that is not known here.
    """
    trained = [p for p in stage.parameters() if p.requires_grad]
    part, again = getattr(stage, "micro_batch", None), 0
    with autocast(device.type, dtype):
        whole, *blocks = activations(stage, side, device, recomputes)
        if part is not None:
            stage.micro_batch = None  # type: ignore[assignment]
            again = parabola(activations(stage, side, device)[0], part)
    return Memory(
        size_of(trained),
        size_of(frozen_tensors(stage)),
        moments(stage),
        size_of(stage.averaged_parameters().values()),
        whole,
        tuple(blocks) if part is None else (),  # else a part keeps all while it is computed again
        again,
    )


def activations(stage: Stage, side: int, device: torch.device, recomputes: bool = False) -> list[Counts]:
    """Count what the forward passes of batches of ``SIZES`` keep, and what is added for each block."""
    own, counts = [*stage.parameters(), *frozen_tensors(stage)], []
    blocks = blocks_of(stage) if recomputes else []
    for size in SIZES:
        torch.clear_autocast_cache()
        batch = samples(stage, side, size, device)
        noise = SampleNoise(0, batch["key"])
        with OnGPU():
            counts.append(kept(lambda: stage.losses(batch, noise)["loss"], own, blocks))  # noqa: B023
    return list(zip(*counts, strict=True))


def frozen_networks(stage: nn.Module) -> list[nn.Module]:
    """Return networks that are used, but not trained, loss terms' too."""
    owners = [module for module in stage.modules() if isinstance(module, Frozen)]
    owners += [x for module in stage.modules() for x in vars(module).values() if isinstance(x, Frozen)]
    return [owner.module for owner in dict.fromkeys(owners)]


def frozen_tensors(stage: nn.Module) -> list[Tensor]:
    """Return all weights that are not trained."""
    found = [p for p in stage.parameters() if not p.requires_grad]
    return found + [x for net in frozen_networks(stage) for x in (*net.parameters(), *net.buffers())]


def moments(stage: Stage) -> int:
    """Return the bytes of the optimizer's moments: two of each parameter, but one of Muon's matrices."""
    optimizer = stage.optimizer.build(stage)
    number = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            one = isinstance(optimizer, MuonOptimizer) and p.ndim >= 2 and group["orthogonal"]
            number += p.numel() * (1 if one else 2)
    return 4 * number


def split(memory: Memory, stage: Stage, world: int, half: bool = False) -> Memory:
    """Return the memory of each of ``world`` GPUs with ``fsdp2`` (``hsdp``: of each GPU of a node).

    Weights outside of blocks stay gathered during a step, and two blocks, the one that computes and the next
    one; the largest unit's gradient is whole until it is split. ``half``: gathered in bfloat16. Then this is
    an upper bound: the copies of weights that autocast keeps elsewhere are counted, but need not be made.
    """
    blocks = sorted(size_of(p for p in block.parameters() if p.requires_grad) for block in blocks_of(stage))
    rest = memory.weights - sum(blocks)
    gathered = (rest + sum(blocks[-2:])) // (2 if half else 1)
    gradient = max(rest, *blocks[-1:])
    return replace(
        memory,
        weights=memory.weights // world,
        moments=memory.moments // world,
        average=memory.average // world,
        frozen=memory.frozen + gathered + gradient,
    )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)
