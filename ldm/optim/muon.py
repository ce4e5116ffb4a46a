"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

torch.optim.Muon takes matrices only; here kernels are matrices too, (out, in * height * width), equal
shapes are orthogonalised in one batch, and everything that is no matrix is updated by Adam.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from ldm.distributed.dtensor import full_tensor, shard_like

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of p(s) = a s + b s^3 + c s^5, steepest at 0


def orthogonalize(matrices: Tensor, num_iterations: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring all singular values of each matrix near 1, keeping its singular vectors.

    Five Newton-Schulz iterations of p above (Jordan et al. 2024): the values end in about [0.7, 1.2], which
    serves an update as well as exactly 1. So does bfloat16.

    Args:
        matrices: (N, rows, columns), any scale; a zero matrix stays zero.
        num_iterations: Iterations of the polynomial.
        dtype: What the iterations are computed in.

    Returns:
        (N, rows, columns) in ``dtype``.
    """
    x = matrices.to(dtype)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class MuonOptimizer(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices and kernels, Adam for everything else.

    The orthogonalised update is scaled to a root mean square of 0.2, what Adam's typically is (Liu et al.
    2025, arXiv:2502.16982, sec. 2.2), so that one learning rate suits matrices and vectors.

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
        gradients = [cast(Tensor, p.grad) for p in parameters]
        momenta = self._moment("momentum", parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = [gradient.clone() for gradient in gradients]
        torch._foreach_lerp_(directions, momenta, group["momentum"])  # torch 2.11 splits this form only
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, p in enumerate(parameters):
            alike[p.shape[0], p[0].numel()].append(i)
        for shape, members in alike.items():
            stack = torch.stack([full_tensor(directions[i]).reshape(shape) for i in members])
            update = orthogonalize(stack, dtype=self.dtype) * (0.2 * max(shape) ** 0.5)
            for i, matrix in zip(members, update, strict=True):
                p = parameters[i]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(shard_like(matrix.to(p.dtype).reshape(p.shape), p), alpha=-group["lr"])

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
