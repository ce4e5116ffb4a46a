"""Native and emulated precisions of a processor, and shared memory."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
"""Data type of matrix products, by Lightning's names of precisions."""


Inference = Literal["auto", "32", "bf16"]
"""Values of --precision of commands that do not train."""


def device_of(accelerator: str) -> torch.device:
    """Find the device that Lightning takes for ``trainer.accelerator``: a GPU for auto, if there is one."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for matrix products of ``dtype``.

    An AVX2 processor has none for bfloat16: it takes up to a hundred times as long as float32.
    Apple's GPUs were never tried: they are taken to compute everything.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or _cpu_computes(dtype)


def choose_precision(device: torch.device) -> str:
    """Choose what ``trainer.precision: auto`` stands for: bf16-mixed where bfloat16 is native, else 32-true.

    Float16 is never selected: it needs loss scaling. Nor is bfloat16 on Apple's GPUs: untested.
    """
    native = device.type in ("cuda", "cpu") and computes(torch.bfloat16, device)
    return "bf16-mixed" if native else "32-true"


def inference_precision(wanted: Inference, device: torch.device) -> str:
    """Choose what networks compute in that are not trained, by Lightning's name.

    Args:
        wanted: auto takes bfloat16 on GPUs that have it natively; on CPUs results are float32's.
        device: Where it is computed.
    """
    native = device.type == "cuda" and computes(torch.bfloat16, device)
    return "bf16-mixed" if wanted == "bf16" or (wanted == "auto" and native) else "32-true"


def inference(wanted: Inference, device: torch.device) -> torch.autocast:
    """Compute in what ``inference_precision`` chooses."""
    is_half = inference_precision(wanted, device) == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_half)


def warn_of_emulation(option: str, precision: str, device: torch.device) -> str | None:
    """Return a warning with the measured cost of a precision that the device only emulates, else None.

    Args:
        option: Name of the option that ``precision`` comes from.
        precision: One of ``DTYPES``.
        device: Where it is computed.
    """
    dtype = DTYPES[precision]
    if computes(dtype, device):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"warning: {option}: {precision}, but this {device.type} only emulates {name}: matrix products take "
        f"{slowdown(dtype, device):.2g} times as long as in float32 (just measured); "
        f"{choose_precision(device)} is what it computes natively"
    )


def slowdown(dtype: torch.dtype, device: torch.device, size: int = 256) -> float:
    """Measure the time of a product of two (size, size) matrices in ``dtype``, as a multiple of float32's."""
    return _seconds(dtype, device, size) / _seconds(torch.float32, device, size)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the peak of matrix products in ``dtype``, in FLOP/s; a twentieth of a second."""
    size = 8192 if device.type == "cuda" else 512
    return 2 * size**3 / _seconds(dtype, device, size)


def _seconds(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Time a matrix product, five times and for a twentieth of a second at least: the quickest counts."""
    x = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    while len(times) < 6 or sum(times) < 0.05:
        begun = time.perf_counter()
        float((x @ x)[0, 0])  # a GPU is done when the number is here
        times.append(time.perf_counter() - begun)
    return min(times)


def _cpu_computes(dtype: torch.dtype) -> bool:
    """Query torch: oneDNN, which heeds ONEDNN_MAX_CPU_ISA, reports AVX-512 and later, which may emulate."""
    if not torch.backends.mkldnn.is_available():
        return False
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    found = bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    if dtype == torch.bfloat16 and platform.machine().lower() in ("x86_64", "amd64"):
        return found and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return found


SHARED_MEMORY = "/dev/shm"


def check_shared_memory(option: str, num_workers: int, batch_bytes: int, num_processes: int = 1) -> None:
    """Check that there is room for the batches that workers hand over: without it they die, or hang.

    Args:
        option: What sets the number of workers, for the message.
        num_workers: Processes that read and decode, for each one that trains.
        batch_bytes: Size of the tensors of a batch.
        num_processes: Processes of this node that train: all share the memory, and begin at any time.

    Raises:
        ValueError: If two batches of each worker, and the one in use, need more than is free, or those of all
            processes more than there is.
    """
    if not num_workers or not os.path.isdir(SHARED_MEMORY):
        return
    needed, usage = (2 * num_workers + 1) * batch_bytes, shutil.disk_usage(SHARED_MEMORY)
    if needed > usage.free or needed * num_processes > usage.total:
        of = f" of each of {num_processes} processes" if num_processes > 1 else ""
        raise ValueError(
            f"{option}: {num_workers} workers{of} need {needed / 1e6:.1f} MB in {SHARED_MEMORY}, which has "
            f"{usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB free (batches are of "
            f"{batch_bytes / 1e6:.1f} MB): enlarge it (docker run --shm-size=8g), or set 0 workers or "
            "smaller batches"
        )


def device(name: str) -> torch.device:
    """Find the device that ``--device`` names.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: got {name}, expected a device that is here, such as cpu ({reason})"
        ) from error


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the memory of freed tensors, if it computes on a CPU and glibc allocates there.

    By default glibc returns much of it to the system, and each step pays for the same pages anew: up to a
    tenth of the demo's U-Net step. Up to 1 GiB at the end of the heap is kept; tensors above 32 MiB, the most
    that every glibc allows, are returned as before. Values of the environment, MALLOC_TRIM_THRESHOLD_, stay.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    options = {
        "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 32),
        "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 1024),
    }
    if mallopt is not None and not any(name in os.environ for name in options):
        for option, mebibytes in options.values():
            mallopt(option, mebibytes * 2**20)


def decoding_workers(device: torch.device, batch_bytes: int) -> int:
    """Choose how many processes read and decode for one that computes on ``device``.

    On a GPU as many as it has cores, as far as their batches fit into ``SHARED_MEMORY``; on a CPU none: the
    networks need the cores.
    """
    if device.type == "cpu":
        return 0
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = cores
    if os.path.isdir(SHARED_MEMORY):
        fitting = (shutil.disk_usage(SHARED_MEMORY).free // here // batch_bytes - 1) // 2
    return max(0, min(cores // here, fitting))


@contextmanager
def explaining_memory(*settings: str) -> Iterator[None]:
    """Say in one line what memory was requested, what is free, and what helps.

    Args:
        settings: What needs less memory.

    Raises:
        ValueError: Instead of torch's error of a device, or of a CPU, without that much memory.
    """
    try:
        yield
    except RuntimeError as error:
        if (found := memory_requested(error)) is None:
            raise
        raise ValueError(f"out of memory: {found}; what helps: {', or '.join(settings)}") from error


def memory_requested(error: RuntimeError) -> str | None:
    """Read from torch's error what was requested, and what is free; None if it is about something else."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
        device = re.search(r"GPU \d+", text)
        requested = wanted[1] if wanted else "more than there is"
        left = f", {free[2]} of {free[1]} are free" if free else ""
        return f"{device[0] if device else 'the GPU'} was asked for {requested}{left}"
    if found := re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", text):
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return f"the CPU was asked for {int(found[1]) / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB are free"
    return None
