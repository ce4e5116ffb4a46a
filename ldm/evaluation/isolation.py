"""Measuring leaves no trace: a stage's attributes, modes and random numbers are restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
import numpy as np
import torch


@contextmanager
def replaced(pl_module: L.LightningModule, components: Mapping[str, object]) -> Iterator[None]:
    """Replace components of a stage, by the names of its attributes, for the length of a ``with`` block."""
    before = {name: getattr(pl_module, name) for name in components}
    for name, component in components.items():
        setattr(pl_module, name, component)
    try:
        yield
    finally:
        for name, component in before.items():
            setattr(pl_module, name, component)


@contextmanager
def without_trace(pl_module: L.LightningModule) -> Iterator[None]:
    """Generate images without gradients, in eval mode, and leave modes and random numbers as they were."""
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
