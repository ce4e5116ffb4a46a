"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices only; here kernels are matrices too, (out, in * height * width), equal
shapes are orthogonalised in one batch, and everything that is no matrix is updated by Adam.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from ldm.distributed.dtensor import local
from ldm.distributed.spread import node_group, spread_over

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of p(s) = a s + b s^3 + c s^5, steepest at 0
LONG = 1.5
"""Length over width from which fewer multiplications are needed with the Gram matrix."""
RESTART = 3
"""Iterations after which it is computed afresh: as exact then as without it, in bfloat16 too."""


def orthogonalize(
    stacks: Sequence[Tensor], num_iterations: int = 5, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Bring all singular values of each matrix near 1, keeping its singular vectors.

    Five Newton-Schulz iterations of p above (Jordan et al. 2024): the values end in about [0.7, 1.2], which
    serves an update as well as exactly 1. So does bfloat16. Long matrices of one width are iterated on
    together.

    Args:
        stacks: (N, rows, columns) each, any scale; a zero matrix stays zero.
        num_iterations: Iterations of the polynomial.
        dtype: What the iterations are computed in.

    Returns:
        (N, rows, columns) each, in ``dtype``.
    """
    wide = [x if x.shape[1] <= x.shape[2] else x.mT for x in stacks]
    results = [_normalized(x.to(dtype)) for x in wide]
    long: dict[int, list[int]] = defaultdict(list)
    for i, x in enumerate(results):
        if x.shape[2] > LONG * x.shape[1]:
            long[x.shape[1]].append(i)
        else:
            results[i] = _iterate(x, num_iterations)
    for members in long.values():
        alike = [results[i] for i in members]
        for first in range(0, num_iterations, RESTART):
            alike = _iterate_gram(alike, min(RESTART, num_iterations - first))
        for i, x in zip(members, alike, strict=True):
            results[i] = x
    return [x if x.shape == stack.shape else x.mT for x, stack in zip(results, stacks, strict=True)]


def _normalized(x: Tensor) -> Tensor:
    return x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)


def _iterate(x: Tensor, num_iterations: int) -> Tensor:
    for _ in range(num_iterations):
        x = torch.baddbmm(x, _without_a(x @ x.mT), x, beta=QUINTIC[0])
    return x


def _iterate_gram(stacks: Sequence[Tensor], num_iterations: int) -> list[Tensor]:
    """Iterate on Gram matrices G = x x^T alone (dao-lab.ai/blog/2026/gram-newton-schulz).

    An iteration is x <- P x with P = a + b G + c G^2, hence G <- P G P, and the product of all P is applied
    to x once. Rounding leaves G with small negative eigenvalues, which grow: only a few iterations are safe.

    Args:
        stacks: (N, m, k) each, with one m.
        num_iterations: At least 1.
    """
    gram = torch.cat([x @ x.mT for x in stacks])
    product = factor = _with_a(gram)
    for _ in range(num_iterations - 1):
        gram = factor @ gram @ factor
        factor = _with_a(gram)
        product = factor @ product
    return [own @ x for own, x in zip(product.split([len(x) for x in stacks]), stacks, strict=True)]


def _with_a(gram: Tensor) -> Tensor:
    factor = _without_a(gram)
    factor.diagonal(dim1=1, dim2=2).add_(QUINTIC[0])
    return factor


def _without_a(gram: Tensor) -> Tensor:
    return torch.baddbmm(gram, gram, gram, beta=QUINTIC[1], alpha=QUINTIC[2])


class MuonOptimizer(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices and kernels, Adam for everything else.

    The orthogonalised update is scaled to a root mean square of 0.2, what Adam's typically is (Liu et al.
    2025, arXiv:2502.16982, sec. 2.2), so that one learning rate suits matrices and vectors.

    Of several processes each orthogonalises a share: where all have all weights, those of one node share the
    work and send each other the updates; where weights are split, so is the work. Results are those of one
    process but for rounding.

    Args:
        groups: Parameters, or groups of them; a group may set ``orthogonal=False`` to use Adam for matrices
            too, as embeddings want.
        lr: Learning rate.
        momentum: Decay rate of Muon's momentum (Nesterov).
        betas: Decay rates of Adam's moments.
        weight_decay: Decoupled weight decay of matrices and kernels.
        dtype: What updates are orthogonalised in: bfloat16 suffices where the processor computes it natively.
    """

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "orthogonal": True})
        self.dtype = dtype  # of this processor, not of the run: it is in no checkpoint

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in trained if p.ndim >= 2 and group["orthogonal"]]
            others = [p for p in trained if p.ndim < 2 or not group["orthogonal"]]
            if matrices:
                self._step_muon(matrices, group)
            if others:
                self._step_adam(others, group)
        return loss

    def _moment(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in parameters]

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        weights = [local(p) for p in parameters]
        gradients = [local(cast(Tensor, p.grad)) for p in parameters]
        momenta = [local(momentum) for momentum in self._moment("momentum", parameters)]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        # columns are (height, width, channels), as memory has them that is channels last
        matrices = [direction.movedim(1, -1).flatten(1).to(self.dtype) for direction in directions]
        costs = [multiplications(p.shape[0], p.shape[1:].numel()) for p in parameters]
        updates = spread_over(parameters, lambda: self._node).run(matrices, costs, _orthogonalized)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        kernels = [
            update.unflatten(1, (*weight.shape[2:], weight.shape[1])).movedim(-1, 1)
            for update, weight in zip(updates, weights, strict=True)
        ]
        torch._foreach_add_(weights, kernels, alpha=-group["lr"])

    @cached_property
    def _node(self) -> ProcessGroup | None:
        return node_group()

    def _step_adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [cast(Tensor, p.grad) for p in parameters]
        first, second = self._moment("first", parameters), self._moment("second", parameters)
        steps = [self.state[p].get("step", 0) + 1 for p in parameters]
        for p, step in zip(parameters, steps, strict=True):
            self.state[p]["step"] = step
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        scale = torch._foreach_sqrt(torch._foreach_div(second, [1 - beta2**step for step in steps]))
        torch._foreach_add_(scale, 1e-8)
        rates = [-group["lr"] / (1 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(parameters, first, scale, rates)


def multiplications(rows: int, columns: int) -> float:
    """Return how many multiplications the five iterations take for a matrix."""
    width, length = sorted((rows, columns))
    if length > LONG * width:
        # two Gram matrices and applications; 5 factors, 3 products of them, 2 x 3 between
        return 4.0 * width**2 * length + 14.0 * width**3
    return 10.0 * width**2 * length + 5.0 * width**3


def _orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalise (rows, columns), equal shapes in one batch, and scale to a root mean square of 0.2."""
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        alike[matrix.shape].append(i)
    stacks = [torch.stack([matrices[i] for i in members]) for members in alike.values()]
    updates: dict[int, Tensor] = {}
    dtype = matrices[0].dtype if matrices else torch.float32
    for stack, members in zip(orthogonalize(stacks, dtype=dtype), alike.values(), strict=True):
        updates |= zip(members, stack.mul_(0.2 * max(stack.shape[1:]) ** 0.5), strict=True)
    return [updates[i] for i in range(len(matrices))]
