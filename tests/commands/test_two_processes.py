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


def arguments(fresh, name, folder, *more):
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", f"--run={fresh.runs / folder}"]
    return fresh.arguments(name, *GENTLE, *short, *more)


def moved(key, value):
    """Leave out the bias of attention's keys: no softmax feels it, so its gradient is all rounding."""
    if key.endswith("in_proj_bias"):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value


def rows(run, column):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "clip"])
def test_one_process_equals_two(fresh, name):
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=8"]
    command = [sys.executable, "-m", "ldm.fit", *arguments(fresh, name, "two", *both)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 0, result.stderr
    assert fit.main(arguments(fresh, name, "one", "--data.batch_size=16")) == 0
    one, two = (
        torch.load(fresh.runs / n / "checkpoints/last.ckpt", weights_only=True) for n in ("one", "two")
    )
    assert one["samples_seen"] == two["samples_seen"] == 64
    for key, value in one["state_dict"].items():
        ours, theirs = moved(key, two["state_dict"][key]), moved(key, value)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    losses = {n: rows(fresh.runs / n, "val/loss") for n in ("one", "two")}
    if name == "autoencoder":  # CLIP's validation loss contrasts within a process's batch
        assert losses["two"] == pytest.approx(losses["one"], rel=1e-6)
    assert rows(fresh.runs / "one", "samples") == rows(fresh.runs / "two", "samples")
