"""Less memory for more arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from ldm.stage_protocols import blocks_of

ATTENTION = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
"""Kernels of attention, and whether they may be used; on CPUs too."""


class ActivationCheckpointing(L.Callback):
    """Computes what is inside a block again when its gradient is due, instead of keeping it until then.

    Of a ResNet block or a transformer only the input is kept (Chen et al. 2016, arXiv:1604.06174), so that a
    larger batch or network fits. A step has a second forward pass, and takes a quarter to a third longer.
    Losses, gradients and random numbers are the same. Networks without ``blocks()``, and frozen ones, are
    left alone.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for block in blocks_of(pl_module):
            # ``forward``, not the call: hooks of parallel training stay around the two passes
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():  # the second pass is compiled with the kernels of the first
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    kernels = [kernel for kernel, is_allowed in ATTENTION.items() if is_allowed()]

    def block(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(kernels):  # the ones of the forward pass in the backward pass too
            return forward(*args, **kwargs)

    return checkpoint(block, *args, use_reentrant=False, **kwargs)
