"""Recipes: optimizer, learning-rate schedule and scaling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import nn

from ldm.io.config import Configurable
from ldm.optim.adamw import FusedAdamW, is_fusible
from ldm.optim.muon import MuonOptimizer


class Scaling(Configurable, ABC):
    """Scaling of the learning rate with the samples of an optimizer step, over all processes and batches.

    Args:
        batch: Samples of a step for which ``lr`` is meant.

    Raises:
        ValueError: If ``batch`` is less than 1.
    """

    def __init__(self, batch: int) -> None:
        if batch < 1:
            raise ValueError(f"optimizer.scaling.batch: got {batch}, expected at least 1")
        self.batch = batch

    @abstractmethod
    def factor(self, num_samples: int) -> float:
        """Return the factor of the learning rate at ``num_samples`` per step."""


class NoScaling(Scaling):
    """The learning rate does not depend on the batch."""

    def __init__(self) -> None:
        super().__init__(1)

    def factor(self, num_samples: int) -> float:
        """Return 1."""
        return 1.0


class LinearScaling(Scaling):
    """k times the samples, k times the rate, for SGD: Goyal et al. 2017 (arXiv:1706.02677), Section 2.1.

    Args:
        batch: Samples of a step for which ``lr`` is meant.
    """

    def factor(self, num_samples: int) -> float:
        """Return k = num_samples / batch."""
        return num_samples / self.batch


class SquareRootScaling(Scaling):
    """k times the samples, sqrt(k) times the rate, for Adam: Malladi et al. 2022 (arXiv:2205.10287).

    Their rule also brings 1 - beta of both moments to k times as much; here the betas stay.

    Args:
        batch: Samples of a step for which ``lr`` is meant.
    """

    def factor(self, num_samples: int) -> float:
        """Return sqrt(k), k = num_samples / batch."""
        return math.sqrt(num_samples / self.batch)


class Optimization(Configurable, ABC):
    """An optimizer with a linear warm-up and a decay over the run.

    Args:
        lr: Peak learning rate.
        warmup: Optimizer steps of the linear warm-up from 0.
        decay: How the rate falls from its peak to 0 at ``trainer.max_steps``.
        weight_decay: Decoupled weight decay of matrices and kernels; vectors do not decay.
        scaling: How the rates follow the samples of a step; none do unless it is given.
    """

    def __init__(
        self,
        lr: float,
        warmup: int = 500,
        decay: Literal["cosine", "linear", "none"] = "cosine",
        weight_decay: float = 0.01,
        scaling: Scaling | None = None,
    ) -> None:
        self.lr = lr
        self.warmup = warmup
        self.decay = decay
        self.weight_decay = weight_decay
        self.scaling = scaling or NoScaling()

    @abstractmethod
    def build(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        """Make the optimizer over the module's parameters that require a gradient.

        Args:
            module: What is trained.
            dtype: What the optimizer may multiply matrices in.
        """

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


class AdamW(Optimization):
    """AdamW (Loshchilov & Hutter 2017): what latent diffusion was trained with.

    Args:
        lr: Peak learning rate.
        warmup: Optimizer steps of the linear warm-up from 0.
        decay: How the rate falls from its peak to 0 at ``trainer.max_steps``.
        weight_decay: Decoupled weight decay of matrices and kernels; vectors do not decay.
        betas: Decay rates of the first and second moment.
        scaling: How the rates follow the samples of a step; none do unless it is given.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        warmup: int = 500,
        decay: Literal["cosine", "linear", "none"] = "cosine",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__(lr, warmup, decay, weight_decay, scaling)
        self.betas = betas

    def build(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        """Make the optimizer, with one group that decays and one that does not; it multiplies no matrices."""
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        if is_fusible(trained):
            return FusedAdamW(groups, self.lr, self.betas)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, foreach=True)


class Muon(Optimization):
    """Muon (Jordan et al. 2024): needs half the steps of AdamW or fewer on the demo, at 10 times its rate.

    Embedding tables are updated by Adam, with every other vector.

    Args:
        lr: Peak learning rate of matrices and kernels.
        warmup: Optimizer steps of the linear warm-up from 0.
        decay: How the rate falls from its peak to 0 at ``trainer.max_steps``.
        weight_decay: Decoupled weight decay of matrices and kernels.
        adam_lr: Peak learning rate of embeddings and vectors; ``lr`` unless given.
        scaling: How the rates follow the samples of a step; none do unless it is given.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        warmup: int = 100,
        decay: Literal["cosine", "linear", "none"] = "cosine",
        weight_decay: float = 0.01,
        adam_lr: float | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__(lr, warmup, decay, weight_decay, scaling)
        self.adam_lr = lr if adam_lr is None else adam_lr

    def build(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        """Make the optimizer, with one group for Muon, which computes in ``dtype``, and one for Adam."""
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        trained = [(n.rpartition(".")[2], p) for n, p in module.named_parameters() if p.requires_grad]
        by_adam = [p for n, p in trained if p.ndim < 2 or id(p) in tables or n.endswith("embedding")]
        rest = {id(p) for p in by_adam}
        groups = [
            {"params": [p for _, p in trained if id(p) not in rest]},
            {"params": by_adam, "lr": self.adam_lr, "orthogonal": False},
        ]
        return MuonOptimizer(groups, lr=self.lr, weight_decay=self.weight_decay, dtype=dtype)
