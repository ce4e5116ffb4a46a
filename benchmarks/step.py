"""How near is the U-Net's step to a processor's peak? ``python -m benchmarks.step [--size large]``.

Forward and backward passes by turns on a CPU: ours, compiled with ``--compile``, and diffusers' with the same
weights in both memory layouts, as shares of what products of 1024 x 1024 matrices reach in the same rounds;
then where ours spends its time. Were all but convolutions and matrix products free, "products alone" would
be the share. Times are of the processor. Needs diffusers (``pip install -e '.[test]'``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.blocks import WAYS, changed
from ldm.hardware import keep_freed_memory
from ldm.interop.diffusers_configs import unet_config
from ldm.interop.model import arguments
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

SIZES = {"small": ((64, 128), 8, 32), "large": ((128, 256), 16, 4)}
"""Channels of the levels, side of the latents, samples of a batch."""
KINDS = {
    "convolutions": ("convolution",),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "_softmax"),
    "group and layer norm": ("native_group_norm", "native_layer_norm"),
    "SiLU, GELU, sums and products": ("silu", "gelu", "add", "mul", "sum"),
    "copies": ("cat", "_to_copy", "clone", "copy"),
}
"""Operators by the beginnings of their names."""
Call = Callable[[], Tensor]


class Clock(TorchDispatchMode):
    """Adds up the processor time of each kind of operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Time one operator."""
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[kind(func.__name__)] += time.thread_time() - begun
        return result


def kind(name: str) -> str:
    """Name the kind of an operator: the one with the longest beginning that fits."""
    fitting = [
        (len(start), which) for which, starts in KINDS.items() for start in starts if name.startswith(start)
    ]
    return max(fitting)[1] if fitting else "views and the rest"


def networks(size: str, is_compiled: bool) -> dict[str, Call]:
    """Build ours and diffusers' with the same weights, as calls that return the loss."""
    channels, side, batch = SIZES[size]
    chosen = {"block_out_channels": list(channels), "layers_per_block": 1, "num_heads": 4}
    given = arguments(UNet, {**chosen, "attention": [True, True]})
    ours = UNet(DenoiserDims(sample=4, tokens=96), **given)
    theirs = UNet2DConditionModel.from_config(unet_config(given, 4, 4, 96))
    theirs.load_state_dict(ours.state_dict())
    x, tokens = torch.randn(batch, 4, side, side), torch.randn(batch, 20, 96)
    t = torch.randint(0, 1000, (batch,))
    last: dict[str, Any] = {"memory_format": torch.channels_last}
    ours.to(**last)

    def our_call(net: nn.Module) -> Call:
        return lambda: net(x, t, Cond(tokens=tokens)).float().square().mean()

    def their_call(net: Any) -> Call:
        return lambda: net(x, t, tokens).sample.float().square().mean()

    calls = {"ours": our_call(ours)}
    if is_compiled:
        calls["ours, Compile"] = our_call(changed(ours, WAYS["Compile"]))
    calls["diffusers"] = their_call(theirs)
    calls["diffusers, channels last"] = their_call(copy.deepcopy(theirs).to(**last))
    return calls


def train(call: Call, is_half: bool) -> None:
    """Run a forward and a backward pass; gradients add up, as in accumulated batches."""
    with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        loss = call()
    loss.backward()


def timed(run: Callable[[], object]) -> float:
    """Return the processor time of a call, in seconds."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def by_kind(call: Call, is_half: bool, rounds: int) -> dict[str, float]:
    """Return the median seconds of each kind of operator in a step."""
    clocks = []
    for _ in range(rounds):
        with Clock() as clock:
            train(call, is_half)
        clocks.append(clock.seconds)
    return {name: statistics.median(seconds[name] for seconds in clocks) for name in clocks[0]}


def medians(calls: dict[str, Call], is_half: bool, rounds: int) -> tuple[dict[str, float], float]:
    """Time steps and products of matrices by turns.

    Returns:
        Seconds of each step, and the rate of the products in FLOP/s.
    """
    matrix = torch.randn(1024, 1024, dtype=torch.bfloat16 if is_half else torch.float32)
    runs: dict[str, Callable[[], object]] = {
        name: partial(train, call, is_half) for name, call in calls.items()
    }
    runs["products"] = lambda: [matrix @ matrix for _ in range(5)]
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            found[name].append(timed(run))
    seconds = {name: statistics.median(times[2:]) for name, times in found.items()}
    return seconds, 5 * 2 * 1024**3 / seconds.pop("products")


def report(seconds: dict[str, float], kinds: dict[str, float], flops: int, peak: float) -> None:
    """Print both tables."""
    print("| | ms | share of the peak | ours / it |\n|---|---|---|---|")
    for name, spent in seconds.items():
        print(f"| {name} | {1e3 * spent:.0f} | {flops / spent / peak:.2f} | {seconds['ours'] / spent:.2f} |")
    products = kinds["convolutions"] + kinds["matrix products"]
    print(f"| products alone | {1e3 * products:.0f} | {flops / products / peak:.2f} | |")
    print("\n| ours | ms | share of the step |\n|---|---|---|")
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1e3 * spent:.0f} | {spent / sum(kinds.values()):.2f} |")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--compile", action="store_true", help="Time Compile too: minutes to start.")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    is_half = options.precision == "bf16-mixed"
    calls = networks(options.size, options.compile)
    with FlopCounterMode(display=False) as counter:
        train(calls["ours"], is_half)
    seconds, peak = medians(calls, is_half, options.rounds)
    flops = counter.get_total_flops()
    print(f"{options.size}, {options.precision}: {flops / 1e9:.1f} GFLOP, at most {peak / 1e9:.0f} GFLOP/s\n")
    report(seconds, by_kind(calls["ours"], is_half, options.rounds), flops, peak)


if __name__ == "__main__":
    main()
