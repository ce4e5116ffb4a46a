"""Parts of the benchmark; each runs in a process of its own and returns figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.networks import SIZES, Call, build, call
from ldm.callbacks.compile import Compile
from ldm.hardware import choose_precision, matmul_rate

Figures = dict[str, float | str]
NETWORKS = {"unet": 0, "autoencoder": 1, "clip": 2}


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Args:
        size: One of ``SIZES``.
        device: Where networks compute.
        work: Folder for shards and runs.
        rounds: Steps that are timed.
    """

    size: str
    device: torch.device
    work: Path
    rounds: int = 12

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return torch.bfloat16 if choose_precision(self.device) == "bf16-mixed" else torch.float32

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak(setting: Setting) -> Figures:
    """Measure the peak of matrix products."""
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "cpu"
    rate = matmul_rate(setting.dtype, setting.device)
    return {"device": name, "torch": torch.__version__, "tflops": rate / 1e12}


def compiled(net: nn.Module, mode: Any = None) -> nn.Module:
    """Compile the blocks as ``ldm.fit`` does."""
    stage = L.LightningModule()
    stage.net = net
    Compile(mode=mode, on_cpu=True).on_fit_start(L.Trainer(barebones=True), stage)
    return net


def training(name: str, ours: bool, how: str, setting: Setting) -> Figures:
    """Time training steps with AdamW: milliseconds, share of the peak, memory, seconds to the first step."""
    size = SIZES[setting.size]
    batch = size.batches[NETWORKS[name]]
    loss = call(name, ours, size, batch, setting.device)
    net = build(name, ours, size, setting.device).train()
    flops = arithmetic(net, loss, setting)
    if how.startswith("compile"):
        mode = "reduce-overhead" if how == "compile-graphs" else None
        net = compiled(net, mode) if ours else torch.compile(net)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    begun = time.perf_counter()
    step(net, loss, optimizer, setting)
    first = time.perf_counter() - begun
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = rounds(lambda: step(net, loss, optimizer, setting), setting)
    figures: Figures = {
        "batch": batch,
        "ms": 1000 * seconds,
        "samples_per_second": batch / seconds,
        "share_of_peak": flops / seconds / matmul_rate(setting.dtype, setting.device),
        "first_step_seconds": first,
        "forward_ms": 1000 * rounds(lambda: forward(net, loss, setting), setting),
    }
    if setting.device.type == "cuda":
        figures["gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def arithmetic(net: nn.Module, loss: Call, setting: Setting) -> float:
    """Count the FLOPs of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter, torch.autocast(setting.device.type, setting.dtype):
        loss(net).backward()
    net.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def step(net: nn.Module, loss: Call, optimizer: torch.optim.Optimizer, setting: Setting) -> None:
    """Take a step, and wait for it."""
    half = setting.dtype != torch.float32
    torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=half):
        value = loss(net)
    value.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    setting.wait()


def forward(net: nn.Module, loss: Call, setting: Setting) -> None:
    """Compute a forward pass without gradients, and wait for it."""
    half = setting.dtype != torch.float32
    with torch.no_grad(), torch.autocast(setting.device.type, torch.bfloat16, enabled=half):
        loss(net)
    setting.wait()


def rounds(run: Callable[[], None], setting: Setting) -> float:
    """Return the median seconds of some calls, after two others."""
    times = []
    for _ in range(setting.rounds + 2):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def largest_batch(setting: Setting) -> Figures:
    """Double the batch of the U-Net until it does not fit."""
    size, fits = SIZES[setting.size], 0
    net = build("unet", True, size, setting.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    batch = size.batches[0]
    limit = 2**20 if setting.device.type == "cuda" else 2 * batch
    while batch <= limit:
        try:
            step(net, call("unet", True, size, batch, setting.device), optimizer, setting)
        except torch.OutOfMemoryError:
            break
        fits, batch = batch, 2 * batch
    return {"batch": fits}


def profile(setting: Setting) -> Figures:
    """Say where a step of the U-Net goes: milliseconds of the kernels that take longest."""
    size = SIZES[setting.size]
    loss = call("unet", True, size, size.batches[0], setting.device)
    net = build("unet", True, size, setting.device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    step(net, loss, optimizer, setting)
    with torch.profiler.profile() as found:
        step(net, loss, optimizer, setting)
    events = found.key_averages()
    on_device = setting.device.type == "cuda"

    def microseconds(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    top = sorted(events, key=microseconds, reverse=True)[:15]
    return {event.key[:80]: microseconds(event) / 1000 for event in top}
