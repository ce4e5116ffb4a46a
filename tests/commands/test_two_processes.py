"""One process equals two (gloo) at the same global batch: gradients, weights, validation, samples."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT

from ldm import fit

STEEP = ["--model.optimizer.class_path=exact.SGD", "--model.optimizer.lr=0.1", "--model.optimizer.warmup=1"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
EVEN = [  # times that follow from the place of a sample in the stream
    "--model.objective.times=ldm.diffusion.times.LowDiscrepancy",
    "--model.objective.times.of=ldm.diffusion.times.LogitNormal",
    "--model.objective.offset_noise=0.1",
]


def arguments(fresh, name, folder, *more):
    return fresh.arguments(
        name,
        *STEEP,
        "--ema.decay=0",
        "--trainer.max_steps=10",
        f"--run={fresh.runs / folder}",
        "--trainer.callbacks+=exact.KeepGradients",
        f"--trainer.callbacks.path={fresh.runs / folder}.grad",
        *(EVEN if name == "diffusion" else []),
        *more,
    )


def run(command_line):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [sys.executable, "-m", "ldm.fit", *command_line]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    return result


def distance(one, two):
    """Norm of the difference relative to the norm of all."""
    squares = [((a - two[key]).double().square().sum(), a.double().square().sum()) for key, a in one.items()]
    return (sum(difference for difference, _ in squares) / sum(size for _, size in squares)).sqrt().item()


def rows(run, column):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def checkpoint(fresh, name):
    return torch.load(fresh.runs / name / "checkpoints/last.ckpt", weights_only=True)


CASES = [
    ("autoencoder", ["--data.batch_size=8"]),
    ("clip", ["--data.batch_size=8"]),
    ("diffusion", ["--data.batch_size=8"]),
    ("diffusion", ["--data.batch_size=4", "--trainer.accumulate_grad_batches=2"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), CASES)
def test_one_process_equals_two(fresh, name, share):
    every = 5 * len(share)  # validation is counted in batches
    fresh.runs.mkdir()
    run(arguments(fresh, name, "two", *TWO, *share, f"--trainer.val_check_interval={every}"))
    assert (
        fit.main(arguments(fresh, name, "one", "--data.batch_size=16", "--trainer.val_check_interval=5")) == 0
    )
    ones, twos = (torch.load(fresh.runs / f"{n}.grad", weights_only=True) for n in ("one", "two"))
    assert ones.keys() == twos.keys()
    assert distance(ones, twos) < 5e-6  # sums in another order: 0.6e-6 to 2e-6 measured
    one, two = checkpoint(fresh, "one"), checkpoint(fresh, "two")
    assert one["samples_seen"] == two["samples_seen"] == 160
    assert distance(one["state_dict"], two["state_dict"]) < 1e-6
    assert_same_curves(fresh, name)


TWICE = [*TWO, "--data.batch_size=8"]
ALONE = ["--data.batch_size=16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("autoencoder", TWICE, ALONE), ("clip", TWICE, ALONE), ("diffusion", ALONE, TWICE)],
)
def test_a_run_goes_on_with_another_number_of_processes(fresh, name, before, after):
    fresh.runs.mkdir()
    same = ["--model.optimizer.decay=none", "--trainer.val_check_interval=5"]
    assert fit.main(arguments(fresh, name, "one", *same, *ALONE)) == 0
    run(arguments(fresh, name, "two", *same, *before, "--trainer.max_steps=5"))
    run(arguments(fresh, name, "two", *same, *after))
    one, two = checkpoint(fresh, "one"), checkpoint(fresh, "two")
    assert one["samples_seen"] == two["samples_seen"] == 160
    assert one["Shards"] == two["Shards"]
    assert distance(one["state_dict"], two["state_dict"]) < 1e-6
    assert rows(fresh.runs / "one", "samples") == rows(fresh.runs / "two", "samples")
    assert_same_curves(fresh, name)


def assert_same_curves(fresh, name):
    quarters = [f"val/loss_quarter_{i}" for i in (1, 2, 3, 4)] if name == "diffusion" else []
    for column in ["val/loss", *quarters, *(["val/accuracy"] if name == "clip" else [])]:
        losses = {n: rows(fresh.runs / n, column) for n in ("one", "two")}
        assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
        assert len(losses["one"]) == 2
    trained = {n: rows(fresh.runs / n, "train/loss") for n in ("one", "two")}
    assert trained["two"] == pytest.approx(trained["one"], rel=1e-5)
    assert len(trained["one"]) == 10


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "every", "more"), [(1, 100, 0), (2, 100, 0), (2, 1, 1)])
def test_a_step_tells_the_others_its_gradients_and_losses_that_are_logged(fresh, batches, every, more):
    fresh.runs.mkdir()
    counts = ["--trainer.callbacks+=exact.CountCollectives", f"--trainer.callbacks.path={fresh.runs}/said"]
    quiet = [f"--trainer.accumulate_grad_batches={batches}", "--trainer.val_check_interval=100"]
    quiet += [f"--trainer.log_every_n_steps={every}"]
    run(arguments(fresh, "autoencoder", "two", *TWO, *quiet, *counts))
    said = torch.load(fresh.runs / "said", weights_only=True)
    assert set(said) == {"gloo:all_reduce"}
    buckets = 2  # of 681,911 gradients
    assert len(said) == 2 * (buckets + more)


def test_clip_says_how_many_pairs_it_contrasts(fresh):
    accumulate = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=1"]
    with pytest.warns(UserWarning, match=r"CLIP contrasts 8 pairs at once, not 16"):
        assert fit.main(fresh.arguments("clip", *accumulate)) == 0
