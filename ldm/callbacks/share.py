"""The first samples of a validation set, split over processes, and a quiet place to measure them in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch

from ldm.types import Batch


def share(trainer: L.Trainer, num_samples: int) -> int:
    """Return how many of the first ``num_samples`` samples are this process's.

    Process r of w validates samples r, r + w, r + 2 w, ...
    """
    return len(range(trainer.global_rank, num_samples, trainer.world_size))


def first(batch: Batch, count: int) -> Batch:
    """Take the first ``count`` samples of a batch."""
    return {name: field[:count] for name, field in batch.items()}  # type: ignore[return-value, index]


@contextmanager
def replaced(pl_module: L.LightningModule, parts: Mapping[str, object]) -> Iterator[None]:
    """Give a stage other parts, by the names of its attributes, for the length of a ``with`` block."""
    before = {name: getattr(pl_module, name) for name in parts}
    for name, part in parts.items():
        setattr(pl_module, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pl_module, name, part)


@contextmanager
def without_trace(pl_module: L.LightningModule) -> Iterator[None]:
    """Generate pictures without gradients, in eval mode, and leave modes and random numbers as they were."""
    modes = {name: module.training for name, module in pl_module.named_modules()}
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    pl_module.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for name, module in pl_module.named_modules():
            module.training = modes[name]
