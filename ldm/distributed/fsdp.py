"""Fully sharded training: for weights, averages and optimizer moments that do not fit on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from typing_extensions import override

from ldm.distributed.dtensor import gather_full, reshard, shard_like, unshard
from ldm.stage_protocols import blocks_of

Weights = Literal["float32", "bfloat16"]


class FSDP2(DDPStrategy):
    """Shards every trained weight over all processes (Zhao et al. 2023, arXiv:2304.11277; FSDP2 of torch).

    Its gradient, average and moments are sharded alike. Each block is unsharded on each device while it
    computes, forward and backward. A network without ``blocks()`` is unsharded at once, as every network is
    during validation, where ranks take different numbers of batches. Frozen networks are never sharded.

    Each process reads the same samples as with DDP and the result is the same but for rounding. So are the
    checkpoints: the first process gathers full tensors, and any number of processes resumes from them, with
    this strategy or another. Each process first builds the model and reads the checkpoint in main memory.

    Accumulated gradients are reduced after each batch: to wait would need memory for all of them.
    A run that ends with an error leaves the checkpoint before it: one process alone cannot write another.

    Args:
        weights: How weights are sent, and kept by a device while it computes with them. ``bfloat16`` halves
            both. Each process still keeps its shard of them, of their average and of moments in float32;
            gradients are added up in float32, and checkpoints are the same. For
            ``trainer.precision`` bf16-mixed.
    """

    def __init__(self, weights: Weights = "float32") -> None:
        super().__init__()
        self.weights = weights

    @override
    def model_to_device(self) -> None:
        assert self.lightning_module is not None
        # weights to be trained stay in main memory until they are sharded
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            super().model_to_device()

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        shape = self.mesh_shape
        names, counts = tuple(shape), tuple(shape.values())
        mesh = init_device_mesh(self.root_device.type, counts, mesh_dim_names=names)
        split(self.lightning_module, mesh, self.weights)
        super().model_to_device()  # frozen parts and buffers

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Dimensions that processes are laid out in: along the last one the weights are split."""
        return {"processes": self.world_size}

    @override
    def on_validation_start(self) -> None:
        assert self.lightning_module is not None
        unshard(self.lightning_module)

    @override
    def on_validation_end(self) -> None:
        assert self.lightning_module is not None
        reshard(self.lightning_module)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        super().save_checkpoint(gather_full(checkpoint, self.is_global_zero), filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        states = [
            shard_optimizer_state(state, optimizer)
            for state, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True)
        ]
        super().load_optimizer_state_dict({"optimizer_states": states})

    @override
    def teardown(self) -> None:
        # without moving the weights to main memory: unsharded, they may not fit there either
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class HSDP(FSDP2):
    """Shards every trained weight over the processes of a node, as FSDP2 does, and replicates it over nodes.

    Weights are unsharded over the fast links within a node only, and between nodes go gradients alone, an
    equal part of them from each process: for many nodes, if the model fits on one (Zhao et al. 2023, sec.
    3.2.2).
    """

    @property
    def mesh_shape(self) -> dict[str, int]:
        """Nodes, and processes of each."""
        return {"nodes": self.num_nodes, "processes": self.num_processes}


def split(module: nn.Module, mesh: DeviceMesh, weights: Weights = "float32") -> None:
    """Shard the weights of a stage block by block; collective.

    Args:
        module: The stage.
        mesh: All processes: in one line, or in rows that split the weights each for itself.
        weights: How they are sent and computed with.

    Raises:
        ValueError: If a weight is a single number, which cannot be split.
    """
    numbers = [name for name, weight in module.named_parameters() if weight.ndim == 0]
    if numbers:
        raise ValueError(
            f"trainer.strategy: FSDP2 cannot split {', '.join(numbers)}, a single number, expected weights "
            f"with dimensions, e.g. of shape (1,), or ddp"
        )
    module.to(memory_format=torch.contiguous_format)  # FSDP2 knows no other
    policy = mixed_precision(weights)
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for step in ("training_step", "validation_step"):  # what Lightning calls instead of forward
        register_fsdp_forward_method(module, step)


def mixed_precision(weights: Weights) -> MixedPrecisionPolicy:
    """Describe how weights are sent and computed with; gradients are added up in float32 either way."""
    if weights == "float32":
        return MixedPrecisionPolicy()
    # what goes in is not rounded, timesteps for one: autocast decides
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def shard_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Shard the moments of an optimizer's full state like its parameters."""
    saved = [i for group in state["param_groups"] for i in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    owner = dict(zip(saved, weights, strict=True))

    def placed(value: Any, weight: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == weight.shape
        return shard_like(value, weight) if fits else value

    moments = {i: {k: placed(v, owner[i]) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": moments}
