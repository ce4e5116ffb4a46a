"""Bytes that a step sends: counted on loopback, and computed: ``python -m benchmarks.traffic``.

Processes of gloo on this machine; other work on loopback would be counted too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ldm.distributed.fsdp import Weights, mixed_precision
from ldm.losses.contrastive import PairLoss, Pairs, Softmax
from ldm.losses.sigmoid import Sigmoid
from ldm.optim.muon import MuonOptimizer

WIDTH, DEPTH, STEPS = 1024, 8, 5
NUMBERS = WIDTH**2 * DEPTH
"""Parameters of the network."""
PAIRS = 1024
"""Pairs of images and captions of a process, vectors as wide as the network."""


def received() -> int:
    """Return the bytes that this machine has received on loopback."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.split()[0] == "lo:"))


def network() -> nn.Module:
    """Make layers of equal size, without biases."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)))


def count(step: Callable[[], object]) -> float:
    """Return the bytes that all processes together receive in a step; the first is left out."""
    step()
    dist.barrier()
    before = received()
    for _ in range(STEPS):
        step()
    dist.barrier()
    return (received() - before) / STEPS


def measure() -> dict[str, tuple[float, float]]:
    """Return counted and computed bytes of a step, of all processes."""
    world, x = dist.get_world_size(), torch.ones(1, WIDTH)
    plain, halved = DistributedDataParallel(network()), DistributedDataParallel(network())
    halved.register_comm_hook(None, bf16_compress_hook)
    mesh = init_device_mesh("cpu", (world,))
    split, narrow = network(), network()
    kinds: tuple[tuple[nn.Module, Weights], ...] = ((split, "float32"), (narrow, "bfloat16"))
    for net, weights in kinds:
        for layer in net:  # type: ignore[attr-defined]
            fully_shard(layer, mesh=mesh, mp_policy=mixed_precision(weights), reshard_after_forward=True)

    def narrow_step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = narrow(x).sum()
        loss.backward()

    found: dict[str, tuple[float, float]] = {
        "ddp, float32": (count(lambda: plain(x).sum().backward()), 2 * (world - 1) * 4 * NUMBERS),
        "ddp, bfloat16": (count(lambda: halved(x).sum().backward()), 2 * (world - 1) * 2 * NUMBERS),
        # weights twice; gradients, which gloo sends twice to add them up, and NCCL once
        "fsdp2, float32": (count(lambda: split(x).sum().backward()), (2 * 4 + 2 * 4) * (world - 1) * NUMBERS),
        "fsdp2, bfloat16 weights": (count(narrow_step), (2 * 2 + 2 * 4) * (world - 1) * NUMBERS),
    }
    half = torch.bfloat16
    for name, net, factor in (
        ("Muon's updates, ddp", plain, world - 1),
        ("Muon's updates, fsdp2", split, 2 * (world - 1) / world),
    ):
        found[name] = (count(MuonOptimizer(net.parameters(), dtype=half).step), factor * 2 * NUMBERS)
    for loss, factor in ((Softmax(), 4), (Sigmoid(), 2)):
        name = f"{type(loss).__name__}, vectors of {PAIRS} pairs a process"
        found[name] = (count(lambda: contrast(loss)), factor * 4 * world * (world - 1) * PAIRS * WIDTH)  # noqa: B023
    return found


def contrast(loss: PairLoss) -> None:
    """Compute a contrastive loss and its gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    vectors = torch.full((2, PAIRS, WIDTH), WIDTH**-0.5, requires_grad=True)
    captions, one = torch.arange(world * PAIRS), torch.ones(())
    loss(Pairs(vectors[0], vectors[1], captions, one, -one, rank, world))[0].backward()


def process(rank: int, world: int, folder: str) -> None:
    """Measure in one of the processes; the first prints."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    found = measure()
    if rank == 0:
        for name, (counted, computed) in found.items():
            megabytes = f"{counted / 1e6:.1f} | {computed / 1e6:.1f}"
            print(f"| {world} | {name} | {megabytes} | {counted / computed:.3f} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    print(f"{NUMBERS / 1e6:.1f} million parameters; megabytes per step, all processes together\n")
    print("| processes | what | counted | computed | ratio |\n|---|---|---|---|---|")
    for world in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, (world, folder), nprocs=world)


if __name__ == "__main__":
    main()
