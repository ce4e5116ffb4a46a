"""The gradient of an optimizer step: one norm of it serves clipping and the check that it is finite."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ldm.distributed.dtensor import full_tensor
from ldm.optim.adamw import FusedAdamW
from ldm.optim.combined import parts


class HostNumber:
    """A number that the host reads later, without waiting for what the device does after it.

    Args:
        value: () on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> float:
        """Return it, once the device has computed it."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._value.numpy())  # of the host's copy: item() is kept for waits


def gradients(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients that an optimizer is about to use."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def total_norm(optimizer: Optimizer) -> Tensor:
    """Return the 2-norm of all gradients as one vector, (), on their device; collective if they are split."""
    return full_tensor(torch.nn.utils.get_total_norm(gradients(optimizer)))


@torch.no_grad()
def clip(optimizer: Optimizer, norm: Tensor, max_norm: float) -> None:
    """Scale the gradients to a norm of at most ``max_norm``: now, or by the optimizer in its step.

    Args:
        optimizer: Is about to take a step.
        norm: What ``total_norm`` returned.
        max_norm: Largest norm.
    """
    for part in parts(optimizer):
        if isinstance(part, FusedAdamW):
            part.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()  # as torch clips
        else:
            weights = [p for group in part.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)


def skip_if(optimizer: Optimizer, bad: Tensor) -> bool:
    """Have an optimizer skip its next step if ``bad``, a number () on its device, is 1 and not 0.

    Returns:
        Whether it can do so without the host; if not, nothing is changed.
    """
    found = [part for part in parts(optimizer) if isinstance(part, FusedAdamW)]
    if len(found) < len(parts(optimizer)):
        return False
    for part in found:
        part.found_inf = bad
    return True


def drop(optimizer: Optimizer) -> None:
    """Take the gradients away: an optimizer passes over parameters without one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
