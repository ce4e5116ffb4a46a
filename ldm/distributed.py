"""How several processes train together: data parallelism without what costs time and gives nothing."""

from __future__ import annotations

import inspect

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from ldm.fsdp import FSDP2


def register() -> None:
    """Let ``ddp``, which is what ``auto`` takes for several devices too, stand for ours, and ``fsdp2``.

    Gradients lie in the buffers that they are sent from, which saves a copy of all of them. Buffers are not
    sent from the first process before every step: all processes compute the same, since none depends on the
    batch. No parameter may be unused, and no static graph is promised: torch has no way to check that
    promise, breaks where gradients are accumulated, and wins no time by it here (benchmarks/RESULTS.md).
    """
    StrategyRegistry.register(
        "ddp",
        DDPStrategy,
        "data parallelism",
        override=True,
        gradient_as_bucket_view=True,
        **{_buffers(): False},
    )
    StrategyRegistry.register("fsdp2", FSDP2, "data parallelism with split weights", override=True)


def check_strategy(trainer: L.Trainer) -> None:
    """Check that checkpoints, averages and metrics know what a strategy does with the weights.

    Raises:
        ValueError: If they do not, as with ``fsdp``, torch's first version.
    """
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        found = type(trainer.strategy).__name__
        raise ValueError(f"trainer.strategy: got {found}, expected auto, ddp, or fsdp2 to split weights")


def without_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from asking all processes before every step whether one got SIGTERM.

    That costs a broadcast, and a wait for the device, per step; ``Preemption`` asks every few steps.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def _buffers() -> str:
    """Name the option of torch that sends buffers before each step: it has another name from 2.15 on."""
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
