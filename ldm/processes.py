"""The processes that torchrun started, for commands without a trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ldm.cli import device
from ldm.metrics.group import Alone, Distributed, Group


@contextmanager
def processes(name: str) -> Iterator[tuple[Group, torch.device]]:
    """Join the processes that torchrun started, if it did; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone(), device(name)
        return
    gpu = name == "cuda"
    where = device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else name)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        if gpu:
            torch.cuda.set_device(where)
        yield Distributed(where), where
    finally:
        dist.destroy_process_group()
