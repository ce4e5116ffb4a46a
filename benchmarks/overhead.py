"""What does ``ldm.fit`` put on top of a step? ``python -m benchmarks.overhead [--optimizer Muon]``.

The same steps, of a small U-Net on digits, in turn: under ``ldm.fit``, and in a bare loop with the same
losses, data, clipping, optimizer and average. Milliseconds of processor time, of which other work on the
machine takes none; means over intervals of 20 steps, of which one is logged, and the median of the intervals.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from data.digits import main as pack
from ldm.callbacks.ema import averaged_parameters
from ldm.rng import SampleNoise
from ldm.stages.stage import Stage
from ldm.training import FitCLI, build

WARM_UP = 20
EVERY = 20


class Clock(L.Callback):
    """Notes the processor time of this process at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note it, always at the same place of a step."""
        self.times.append(time.process_time())


def command(folder: Path, options: argparse.Namespace, steps: int, number: int) -> FitCLI:
    """Build a run of ``steps`` steps."""
    width = options.width
    chosen = {
        "run": folder / f"run{number}",
        "wandb.mode": "disabled",
        "data.train": folder / "shards/train-{000000..000002}.tar",
        "data.val": folder / "shards/val-000000.tar",
        "data.batch_size": options.batch,
        "model.optimizer": options.optimizer,
        "model.denoiser.block_out_channels": f"[{width}, {2 * width}]",
        "model.denoiser.norm_groups": 2,
        "model.denoiser.attention": "[false, false]",
        "trainer.accelerator": options.accelerator,
        "trainer.devices": 1,
        "trainer.precision": "32-true",
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": EVERY,
    }
    arguments = [f"--{name}={value}" for name, value in chosen.items()]
    return build(["--config", "demo/digits", *arguments, *options.set])


def framework(cli: FitCLI) -> list[float]:
    """Train under ``ldm.fit``; return seconds of its intervals, per step."""
    clock = Clock()
    cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule)
    return intervals(clock.times)


def bare(stage: Stage, loader: Any, data: Any, steps: int) -> list[float]:
    """Train in a loop of nothing but what a step needs; return seconds of its intervals, per step."""
    optimizer = stage.optimizer.build(stage)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: stage.optimizer.factor(step, steps))
    weights = [weight for weight in stage.parameters() if weight.requires_grad]
    averaged = list(averaged_parameters(stage).values())
    shadow = [weight.detach().clone() for weight in averaged]
    stage.train()
    times = []
    for number, batch in enumerate(itertools.islice(loader, steps)):
        batch = data.on_after_batch_transfer(data.transfer_batch_to_device(batch, stage.device, 0), 0)
        optimizer.zero_grad()
        stage.losses(batch, SampleNoise(f"0/train/{number}", batch["key"]))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(shadow, [weight.detach() for weight in averaged], 0.005)
        times.append(time.process_time())
    return intervals(times)


def intervals(times: list[float]) -> list[float]:
    """Return seconds per step of each interval after the warm-up."""
    marks = times[WARM_UP - 1 :: EVERY]
    return [(end - begin) / EVERY for begin, end in itertools.pairwise(marks)]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=8, help="Channels of the U-Net's first level.")
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--steps", type=int, default=120, help="Of a round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("set", nargs="*", help="Further options of ldm.fit, after --.")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"bare loop": [], "ldm.fit": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(["--out", str(folder / "shards")])
        for number in range(options.rounds):
            cli = command(folder, options, options.steps, number)
            found["ldm.fit"] += framework(cli)
            stage, data = cli.model, cli.datamodule
            found["bare loop"] += bare(stage, data.train_dataloader(), data, options.steps)
    print(f"\n{options.optimizer}, batch {options.batch}, {torch.get_num_threads()} threads")
    ms = {way: 1e3 * statistics.median(times) for way, times in found.items()}
    print("| way | ms per step |\n|---|---|")
    for way, value in ms.items():
        print(f"| {way} | {value:.2f} |")
    print(f"| overhead | {ms['ldm.fit'] - ms['bare loop']:.2f} |")


if __name__ == "__main__":
    main()
