"""What do Recompute and Compile gain? ``python -m benchmarks.blocks [--size sd1 --device cuda]``.

Training steps of the U-Net in turn, plain and with each callback: seconds, and what a forward pass keeps for
the backward pass, apart from the weights. Needs diffusers (``pip install -e '.[test]'``): see ``speed.py``.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.speed import SIZES, Step, networks, seconds, steps
from ldm.callbacks.activation_checkpointing import ActivationCheckpointing
from ldm.callbacks.compile import Compile
from ldm.hardware import choose_precision

WAYS: dict[str, list[L.Callback]] = {
    "plain": [],
    "Recompute": [ActivationCheckpointing()],
    "Compile": [Compile(on_cpu=True)],
    "Recompute, Compile": [ActivationCheckpointing(), Compile(on_cpu=True)],
}


def changed(net: nn.Module, callbacks: list[L.Callback]) -> nn.Module:
    """Return a copy that callbacks took hold of, as they do of a stage's."""
    stage = L.LightningModule()
    stage.net = copy.deepcopy(net)
    for callback in callbacks:
        callback.setup(L.Trainer(barebones=True), stage, "fit")
        callback.on_fit_start(L.Trainer(barebones=True), stage)
    return stage.net


def kept(net: nn.Module, step: Step, precision: str, device: torch.device) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, each storage once, weights not."""
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return tensor

    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        step(net)
    return sum(storage.nbytes() for storage in storages.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--device", default="cpu")
    precisions = ["auto", "32-true", "bf16-mixed", "16-mixed"]
    parser.add_argument("--precision", choices=precisions, default="auto", help="auto: as ldm.fit chooses.")
    parser.add_argument("--batch", type=int, help="Samples of a step; default: the configuration's.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    size, device = SIZES[options.size], torch.device(options.device)
    if options.precision == "auto":
        options.precision = choose_precision(device)
    step, _ = steps(size, options.batch, device)["U-Net"]
    batch = options.batch or size.data(size.diffusion)[0]
    plain, _ = networks(size)["U-Net"]
    plain.to(device).to(memory_format=torch.channels_last)
    nets = {way: changed(plain, WAYS[way]) for way in options.ways}
    first = {way: seconds(net, step, True, options.precision, device) for way, net in nets.items()}
    memory = {way: kept(net, step, options.precision, device) for way, net in nets.items()}
    times: dict[str, list[float]] = {way: [] for way in nets}
    for _ in range(options.rounds + 1):
        for way, net in nets.items():
            times[way].append(seconds(net, step, True, options.precision, device))
    threads = torch.get_num_threads()
    print(f"U-Net {options.size}, {options.precision}, batch {batch}, {device}, {threads} threads; medians")
    print("| | ms per step | kept, MB | first step, s |\n|---|---|---|---|")
    for way in options.ways:
        ms = 1000 * statistics.median(times[way][1:])
        print(f"| {way} | {ms:.1f} | {memory[way] / 1e6:.1f} | {first[way]:.1f} |")


if __name__ == "__main__":
    main()
