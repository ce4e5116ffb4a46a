"""How a stage's parameters are updated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter 2017) with a linear warm-up and a decay over the whole run.

    Weight decay applies to matrices and kernels, not to biases, norms and other vectors.

    Args:
        lr: Peak learning rate.
        warmup: Optimizer steps of the linear warm-up from 0.
        decay: How the rate falls from its peak to 0 at ``trainer.max_steps``.
        betas: Decay rates of the first and second moment.
        weight_decay: Decoupled weight decay.
    """

    lr: float = 1e-4
    warmup: int = 500
    decay: Literal["cosine", "linear", "none"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer over the parameters that require a gradient."""
        trained = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)

    def factor(self, step: int, num_steps: int) -> float:
        """Return the learning rate's factor in [0, 1] at optimizer step ``step`` of ``num_steps``.

        ``num_steps`` <= 0 means a run without an end, which does not decay.
        """
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        if self.decay == "none" or num_steps <= 0:
            return warm
        progress = min(1.0, max(0.0, step - self.warmup) / max(1, num_steps - self.warmup))
        fall = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0 - progress
        return warm * fall
