"""Cost of data parallelism per step, ours and Lightning's: ``python -m benchmarks.ddp``.

Two processes (gloo, one core each) train the demo's autoencoder, one image each, with Lightning's
defaults, with ours, and with a static graph, in turn.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L

from data.shapes.packer import Settings, pack

ROOT = Path(__file__).resolve().parents[1]
LIGHTNINGS = (
    '--trainer.strategy={"class_path": "lightning.pytorch.strategies.DDPStrategy", "dict_kwargs": %s}'
)
WAYS = {
    "Lightning's ddp": [LIGHTNINGS % "{}", "--trainer.callbacks+=benchmarks.ddp.AsksForSignals"],
    "ours": ["--trainer.strategy=ddp"],
    "Lightning's, static graph, unasked": [LIGHTNINGS % '{"static_graph": true}'],
}


class AsksForSignals(L.Callback):
    """Lets Lightning ask all processes before every step whether one got SIGTERM, as it does by itself."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give its method back."""
        del trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor


def seconds(way: list[str], folder: Path, shards: Path, steps: int) -> float:
    """Train, and return the median seconds of a step, the first ones left out."""
    options = {
        "run": folder,
        "wandb.mode": "disabled",
        "data.train": shards / "train-{000000..000002}.tar",
        "data.val": shards / "val-000000.tar",
        "data.batch_size": 1,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.log_every_n_steps": 5,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.devices": 2,
        "sample_grid.num": 2,
    }
    command = [sys.executable, "-m", "ldm.fit", "--config", "configs/demo/autoencoder.yaml"]
    subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in options.items()), *way],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    with (folder / "metrics.csv").open(newline="") as file:
        measured = [
            float(row["train/step_seconds"]) for row in csv.DictReader(file) if row["train/step_seconds"]
        ]
    return statistics.median(measured[len(measured) // 4 :])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        pack(shards, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
        for i in range(options.rounds):
            for number, (name, way) in enumerate(WAYS.items()):
                run = Path(folder) / f"{i}-{number}"
                times[name].append(seconds(way, run, shards, options.steps))
    base = statistics.median(times["Lightning's ddp"])
    print(f"medians of {options.rounds} runs of {options.steps} steps\n")
    print("| way | ms per step | as a ratio |\n|---|---|---|")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"| {name} | {median * 1e3:.1f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
