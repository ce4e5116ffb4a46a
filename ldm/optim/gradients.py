"""The gradient of an optimizer step: one norm of it serves clipping and the check that it is finite."""

from __future__ import annotations

from collections.abc import Sequence

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
def part_norms(optimizer: Optimizer) -> list[Tensor]:
    """Return the 2-norm of the gradients of each part of an optimizer; collective if they are sharded.

    A part has the parameters of the networks, or of one loss term. Its norm is a number () on their device.
    """
    return [_norm(part) for part in parts(optimizer)]


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients as one vector, (), of the norms of their parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(list(norms)))


@torch.no_grad()
def clip(optimizer: Optimizer, norms: Sequence[Tensor], max_norm: float) -> None:
    """Scale each part's gradients to a norm of at most ``max_norm``: now, or by the optimizer in its step.

    So the gradient of a loss term's own parameters does not shorten that of the networks.

    Args:
        optimizer: Is about to take a step.
        norms: What ``part_norms`` returned.
        max_norm: Largest norm.
    """
    for part, norm in zip(parts(optimizer), norms, strict=True):
        if isinstance(part, FusedAdamW):
            part.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()  # as torch clips
        else:
            weights = [p for group in part.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)


def _norm(part: Optimizer) -> Tensor:
    if found := gradients(part):
        return full_tensor(torch.nn.utils.get_total_norm(found))
    weight = next(p for group in part.param_groups for p in group["params"])
    return torch.zeros((), device=weight.device)


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
