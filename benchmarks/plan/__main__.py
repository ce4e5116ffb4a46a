"""What a configuration needs: ``python -m benchmarks.plan diffusion/sd1 autoencoder/kl-f8 clip/vit-b-32``.

Memory of a training step and the largest batch of cards, counted with torch's fake tensors on a GPU that need
not be there; and what the GPUs of a large run send each other, by construction. Upstream runs need not be
there either: their networks are those of the configurations with these run folders. What the callback
Compile saves is not counted: its compiler decides what is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.plan.communication import table
from benchmarks.plan.memory import GIB, USABLE, Memory, absent_gpu, measure, place, split
from benchmarks.plan.stages import build
from ldm.stages.stage import Stage


def rows(memory: Memory, batch: int, cards: Sequence[int], optimizer: str) -> str:
    """Write the memory of a training step as a table."""
    sizes = {
        "trained parameters, float32": memory.weights,
        "their gradients": memory.weights,
        f"moments of {optimizer}": memory.moments,
        "average": memory.average,
        "frozen networks": memory.frozen,
        f"kept for the backward pass, batch {batch}": memory.kept(batch),
        "together": memory.fixed + memory.kept(batch),
    }
    lines = ["| memory of a step, on one GPU or with ddp | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in sizes.items()]
    largest = ", ".join(f"{memory.largest(card)} on {card} GB" for card in cards)
    more = (memory.kept(batch + 1) - memory.kept(batch)) / 1e6
    return "\n".join([*lines, "", f"{more:.1f} MB per further sample; largest batch: {largest}"])


def sharded_rows(memory: Memory, stage: Stage, worlds: Sequence[int], cards: Sequence[int]) -> str:
    """Write what each GPU needs with fsdp2 as a table."""
    heads = "fsdp2: GPUs | weights gathered in | without activations, GiB | largest batch"
    lines = [f"| {heads} |", "|---|---|---|---|"]
    for world in worlds:
        for half in (False, True):
            own = split(memory, stage, world, half)
            largest = ", ".join(f"{own.largest(card)} on {card} GB" for card in cards)
            dtype = "bfloat16" if half else "float32"
            lines.append(f"| {world} | {dtype} | {own.fixed / GIB:.2f} | {largest} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("configs", nargs="+", help="Files, or names such as diffusion/sd1.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--cards", type=int, nargs="+", default=[24, 40, 80], help="GiB of cards.")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="As with the callback of that name."
    )
    options = parser.parse_args(arguments)
    dtype = torch.bfloat16 if options.precision == "bf16-mixed" else torch.float32
    for name in options.configs:
        try:
            planned = build(name)
            communication = table(planned.stage, planned.batch, options.gpus)
            with absent_gpu() as device:
                place(planned.stage, device)
                recomputes = options.activation_checkpointing
                memory = measure(planned.stage, planned.side, dtype, device, recomputes)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        optimizer = type(planned.stage.optimizer).__name__
        print(f"## {name}, {options.precision}, {planned.side} pixels, {USABLE:.0%} of a card used\n")
        print(rows(memory, planned.batch, options.cards, optimizer))
        print(f"\n{sharded_rows(memory, planned.stage, options.gpus, options.cards)}")
        print(f"\n{communication}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
