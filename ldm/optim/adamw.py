"""AdamW in one kernel, which clips and skips on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

DEVICES = ("cpu", "cuda")
"""Devices on which the kernel is known to be right."""


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with clipping, and a step that is skipped, decided by numbers on the device.

    Both numbers are for the next step only. The kernel takes parameter, gradient and moments for arrays of
    one memory layout, and on a CPU does not check it: here they are brought to that of the parameter.

    Args:
        groups: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
    """

    grad_scale: Tensor | None = None
    """() float32: gradients are divided by it."""
    found_inf: Tensor | None = None
    """() float32: 1 if the step is to be skipped, else 0."""

    def __init__(self, groups: Iterable[Any], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        # torch's scaler of float16 would set the two numbers itself, and Lightning then refuses to clip
        self._step_supports_amp_scaling = False

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = like(p.grad, p)
        super().step()
        self.grad_scale = self.found_inf = None
        return loss


def is_fusible(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the fused kernel takes the parameters."""
    return all(not isinstance(p, DTensor) and p.device.type in DEVICES for p in parameters)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Bring a tensor of a parameter's shape to its memory layout, on its device."""
    if tensor.stride() == parameter.stride() and tensor.device == parameter.device:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def place_state(optimizer: torch.optim.Optimizer) -> None:
    """Place the state of a checkpoint, which another implementation may have written, as AdamW needs it."""
    for group in optimizer.param_groups:
        if (is_fused := group.get("fused")) is None and "foreach" not in group:
            continue
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name, value in state.items():
                if name == "step":
                    state[name] = value.to(p.device if is_fused else "cpu", torch.float32)
                elif not isinstance(value, DTensor):
                    state[name] = like(value, p)
