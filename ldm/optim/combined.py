"""One optimizer out of several recipes, each for parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from ldm.optim.recipes import Optimization


class CombinedOptimizer(Optimizer):
    """Several optimizers with one list of parameter groups, one state, and one step.

    Args:
        optimizers: Of different parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._distribute()

    def _distribute(self) -> None:
        """Give each optimizer its own parameter groups, and the common state."""
        first = 0
        for optimizer in self.optimizers:
            last = first + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[first:last], self.state
            first = last

    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._distribute()


def parts(optimizer: Optimizer) -> Sequence[Optimizer]:
    """Return the optimizers that one consists of."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def build_optimizer(
    recipes: Sequence[tuple[Optimization, nn.Module]], num_samples: int, dtype: torch.dtype
) -> tuple[Optimizer, list[Optimization]]:
    """Build one optimizer over the parameters of several modules.

    Args:
        recipes: Recipes with the module that each is for.
        num_samples: Samples of an optimizer step, which learning rates follow.
        dtype: What optimizers may multiply matrices in.

    Returns:
        The optimizer, and the recipe of each of its parameter groups.
    """
    optimizers, owners = [], []
    for recipe, module in recipes:
        optimizer = recipe.build(module, dtype)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * recipe.scaling.factor(num_samples)
            owners.append(recipe)
        optimizers.append(optimizer)
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers), owners


def describe(optimizer: Optimizer, owners: Sequence[Optimization]) -> str:
    """Name the recipes of an optimizer, each with the number of tensors in its parameter groups.

    Args:
        optimizer: What ``build_optimizer`` returned first.
        owners: What it returned second.
    """
    counts: dict[Optimization, list[str]] = {}
    for owner, group in zip(owners, optimizer.param_groups, strict=True):
        counts.setdefault(owner, []).append(str(len(group["params"])))
    return ", ".join(f"{type(owner).__name__} ({' + '.join(n)} tensors)" for owner, n in counts.items())
