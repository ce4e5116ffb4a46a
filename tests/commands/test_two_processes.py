"""One process equals two (gloo) at the same global batch: losses, weights, validation, samples."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT

from ldm import fit

# Adam divides by the size of a gradient: where that is nearly 0, rounding alone would decide the update
GENTLE = [
    "--model.optimizer.class_path=ldm.stages.optimization.AdamW",
    "--model.optimizer.lr=1e-5",
    "--model.optimizer.warmup=1",
    "--ema.decay=0",
]

EVEN = [  # times that follow from the place of a sample in the stream
    "--model.objective.times=ldm.diffusion.times.LowDiscrepancy",
    "--model.objective.times.of=ldm.diffusion.times.LogitNormal",
    "--model.objective.offset_noise=0.1",
]


def arguments(fresh, name, folder, *more):
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", f"--run={fresh.runs / folder}"]
    return fresh.arguments(name, *GENTLE, *short, *(EVEN if name == "diffusion" else []), *more)


def moved(key, value):
    """Leave out the bias of attention's keys: no softmax feels it, so its gradient is all rounding."""
    if key.endswith("in_proj_bias"):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value


def distance(one, two):
    """Norm of the difference relative to the norm of all weights."""
    pairs = [(moved(key, value).double(), moved(key, two[key]).double()) for key, value in one.items()]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


def rows(run, column):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion"])
def test_one_process_equals_two(fresh, name):
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    command = [sys.executable, "-m", "ldm.fit", *arguments(fresh, name, "two", *both)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert fit.main(arguments(fresh, name, "one", "--data.batch_size=16")) == 0
    one, two = (
        torch.load(fresh.runs / n / "checkpoints/last.ckpt", weights_only=True) for n in ("one", "two")
    )
    assert one["samples_seen"] == two["samples_seen"] == 64
    assert distance(one["state_dict"], two["state_dict"]) < 1e-7
    # where a gradient is nearly 0, Adam's step is rounding too: that of one weight in 40,000 of the U-Net
    for key, value in one["state_dict"].items() if name != "diffusion" else ():
        ours, theirs = moved(key, two["state_dict"][key]), moved(key, value)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    quarters = [f"val/loss_quarter_{i}" for i in (1, 2, 3, 4)] if name == "diffusion" else []
    for column in (
        ["val/loss", *quarters] if name != "clip" else []
    ):  # CLIP contrasts within a process's batch
        losses = {n: rows(fresh.runs / n, column) for n in ("one", "two")}
        assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)
        assert len(losses["one"]) == 2
    assert rows(fresh.runs / "one", "samples") == rows(fresh.runs / "two", "samples")
