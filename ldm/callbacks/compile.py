"""Faster kernels from torch's compiler."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import nn
from typing_extensions import override

from ldm.compiler import Compiler, can_be_fused, kind
from ldm.stage_protocols import blocks_of

Mode = Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class Compile(L.Callback):
    """Compiles the blocks of the networks with ``torch.compile`` in the first steps, in place.

    Block by block: equal blocks reuse code, so that the first step waits less, and gradients are sent
    while others are still computed. Only inputs of the sizes of the first step are. Validation,
    sampling and a smaller last batch compute plainly, so that nothing is compiled in the middle of a run.
    Names of weights stay as they are, in checkpoints too. Losses differ by rounding; the same run compiled
    twice has the same. Where the compiler is missing or fails, a warning says so and the run goes on without.

    Networks without ``blocks()``, frozen ones, and blocks of a single layer, where nothing can be fused, are
    left alone. The results are kept for later runs in ``TORCHINDUCTOR_CACHE_DIR``, by default in the folder
    for temporary files. Of several processes of a machine one compiles a kind of block, and the others read
    it there. Needs a C++ compiler.

    Args:
        backend: ``inductor``, or another of ``torch.compile``'s.
        mode: ``reduce-overhead`` also records CUDA graphs, which need more memory; ``max-autotune`` also
            tries kernels, which takes minutes and may choose others in the next run.
        on_cpu: Whether to compile on a CPU too.
    """

    def __init__(self, backend: str = "inductor", mode: Mode | None = None, on_cpu: bool = False) -> None:
        self.backend, self.mode, self.on_cpu = backend, mode, on_cpu
        self.compiler = Compiler({"backend": backend, "mode": mode})
        self._blocks: list[nn.Module] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after ``setup`` of all callbacks: what recomputes a block is compiled with it, in any order
        self._blocks = []
        if trainer.strategy.root_device.type != "cuda" and not self.on_cpu:
            return
        self._blocks = [block for block in blocks_of(pl_module) if can_be_fused(block)]
        self.compiler.replace(self._blocks)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._blocks and trainer.is_global_zero:
            kinds = len({kind(block) for block in self._blocks})
            print(
                f"Compile: {len(self._blocks)} blocks of {kinds} kinds are compiled in the first steps, "
                "which takes a minute or more, or seconds if an earlier run compiled them",
                flush=True,
            )

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if self.mode in WITH_CUDA_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
