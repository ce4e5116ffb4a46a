"""Data parallelism that sends gradients only, and the names of strategies."""

from __future__ import annotations

import inspect
from typing import Literal

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ldm.distributed.fsdp import FSDP2, HSDP
from ldm.distributed.launch import ADVICE
from ldm.lightning_internals import set_ddp_option


class DDP(DDPStrategy):
    """Sends the gradients and, without need, nothing else.

    Gradients lie in the buffers that they are sent from, which saves a copy of all of them. Buffers are sent
    from the first process before every step only where they depend on the batch, as batch norm's do. No
    parameter may be unused, and no static graph is promised: torch has no way to check that promise, and
    breaks where gradients are accumulated (``benchmarks.ddp`` compares the speed).

    Args:
        gradients: How gradients are sent and added up. ``bfloat16`` halves the bytes and rounds to 8 bits, at
            each process that adds its part. The optimizer gets float32 either way.
        bucket_mb: Megabytes of gradients that are sent at once, from when they are there: fewer and larger
            messages suit many processes. None: torch's 25, after a first of 1.

    Raises:
        ValueError: If ``bucket_mb`` is less than 1.
    """

    def __init__(
        self, gradients: Literal["float32", "bfloat16"] = "float32", bucket_mb: int | None = None
    ) -> None:
        if bucket_mb is not None and bucket_mb < 1:
            raise ValueError(f"trainer.strategy.bucket_mb: got {bucket_mb}, expected at least 1")
        super().__init__(gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
        self.gradients = gradients

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        set_ddp_option(self, _buffers(), has_running_statistics(self.lightning_module))
        super().configure_ddp()
        if self.gradients == "bfloat16":  # Lightning's own option is for GPUs only
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, bf16_compress_hook)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether buffers of a module are statistics of its batches, as batch norm's are."""
    norms = (m for m in module.modules() if isinstance(m, _NormBase))
    return any(norm.track_running_stats for norm in norms)


def register() -> None:
    """Let ``ddp``, which ``auto`` takes for several devices too, stand for ours; add ``fsdp2``, ``hsdp``."""
    StrategyRegistry.register("ddp", DDP, "data parallelism", override=True)
    StrategyRegistry.register("fsdp2", FSDP2, "data parallelism with split weights", override=True)
    StrategyRegistry.register("hsdp", HSDP, "the same, split within each node", override=True)


def check_strategy(trainer: L.Trainer) -> None:
    """Check that each device has a process, and that all know what a strategy does with the weights.

    Raises:
        ValueError: If they do not, as with ``fsdp``, torch's first version; or if a strategy has weights of a
            narrower type than ``trainer.precision`` computes in.
    """
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        found = type(trainer.strategy).__name__
        raise ValueError(f"trainer.strategy: got {found}, expected auto, ddp, fsdp2 or hsdp")
    half = isinstance(trainer.strategy, FSDP2) and trainer.strategy.weights == "bfloat16"
    if half and trainer.precision != "bf16-mixed":
        raise ValueError(
            f"trainer.strategy.weights: got bfloat16 with trainer.precision={trainer.precision}, expected "
            "bf16-mixed, or float32 weights"
        )
    devices, count = trainer.num_devices * trainer.num_nodes, trainer.world_size
    if devices != count:
        raise ValueError(f"trainer.devices: {devices} in all, but SLURM started {count} for them: {ADVICE}")


def _buffers() -> str:
    """Name the option of torch that sends buffers before each step: it has another name from 2.15 on."""
    options = inspect.signature(DistributedDataParallel.__init__).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
