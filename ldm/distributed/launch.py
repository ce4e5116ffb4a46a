"""The processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ldm.distributed.group import Group, ProcessGroup, SingleProcess
from ldm.hardware import device

PATIENCE = timedelta(hours=1)
"""Timeout of collectives: ranks have equal work, but one may read from a slower disk."""
ADVICE = (
    "start a process for each device with srun and --ntasks-per-node, or set SLURM_JOB_NAME=interactive to "
    "let ldm.fit start them"
)
"""Advice if SLURM's variables do not fit the devices."""


def launched() -> tuple[int, int] | None:
    """Return the number of nodes, and that of processes on each, that torchrun started; None without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ["WORLD_SIZE"]) // here, here


def follow_slurm() -> None:
    """Complete the variables of SLURM, which Lightning reads wherever SLURM_NTASKS is set.

    Raises:
        ValueError: If some are missing, as in a shell of salloc or in a notebook.
    """
    tasks = int(os.environ.get("SLURM_NTASKS", "0"))
    if not tasks or launched() is not None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return
    ranks = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    if tasks == 1:  # a single task has rank 0, in a shell of salloc too
        os.environ.update({name: os.environ.get(name, "0") for name in ranks})
    elif missing := [name for name in (*ranks, "SLURM_NTASKS_PER_NODE") if name not in os.environ]:
        raise ValueError(f"SLURM_NTASKS is {tasks}, but without {', '.join(missing)}: {ADVICE}")


@contextmanager
def processes(name: str) -> Iterator[tuple[Group, torch.device]]:
    """Join them in a command without a trainer, if there are several; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SingleProcess(), device(name)
        return
    gpu = name == "cuda"
    where = device(f"cuda:{os.environ['LOCAL_RANK']}" if gpu else name)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        if gpu:
            torch.cuda.set_device(where)
        yield ProcessGroup(where), where
    finally:
        dist.destroy_process_group()
