"""Faster kernels from torch's compiler."""

from __future__ import annotations

import lightning as L
import torch
from typing_extensions import override

from ldm.types import HasBlocks


class Compile(L.Callback):
    """Compiles the blocks of the networks with ``torch.compile``, in place.

    Block by block: equal blocks reuse code, so that the first step waits less, and gradients are sent
    while others are still computed. Names of weights stay as they are, in checkpoints too. Losses differ by
    rounding. Networks without ``blocks()``, and frozen ones, are left alone. Each size of images and of
    batches is compiled by itself: kernels for any size are slower, and torch 2.14 fails to make them. Needs a
    C++ compiler.

    Args:
        backend: ``inductor``, or another of ``torch.compile``'s.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # of one class: several widths and sizes, with gradients or not; at its limit of 8 torch would give up
        torch._dynamo.config.recompile_limit = 256
        for network in pl_module.modules():
            if isinstance(network, HasBlocks):
                for block in network.blocks():
                    block.compile(backend=self.backend, dynamic=False)
