"""Keep an already trained network out of training, and out of everything that follows training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Frozen(nn.Module, Generic[M]):
    """Holds a module that is used but never trained.

    It is no submodule: the optimiser, DDP, EMA, ``train()`` and ``state_dict`` leave it out. It
    still moves between devices and dtypes with its owner, and copies refer to the same module.

    Args:
        module: The network; put into eval mode, its parameters lose ``requires_grad``.
    """

    module: M

    def __init__(self, module: M) -> None:
        super().__init__()
        object.__setattr__(self, "module", module.eval().requires_grad_(False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen[M]:
        self.module._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[M]:
        return self
