"""Muon under FSDP2 (two processes of gloo): skipped steps, accumulated batches, and resumed runs."""

import contextlib
import csv

import pytest
import torch
from one_after_another import fit_all

from ldm import fit

SETTINGS = [
    "--model.optimizer.class_path=Muon",
    "--model.optimizer.lr=1e-3",
    "--model.optimizer.warmup=1",
    "--model.optimizer.decay=none",
    "--trainer.gradient_clip_val=0.05",
    "--trainer.max_steps=6",
    "--checkpoints.keep_every_n_steps=3",
    "--ema.decay=0.5",
    "--trainer.callbacks+=exact.IllSteps",
    "--trainer.callbacks.steps=[1,4]",  # before and after the checkpoint of step 3
]
ONE = ["--data.batch_size=16", "--trainer.val_check_interval=3"]
TWO = [
    "--trainer.devices=2",
    "--trainer.strategy=fsdp2",
    "--data.batch_size=4",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=6",
]
HALF = "checkpoints/step=00000003.ckpt"


@pytest.fixture(scope="module")
def runs(chain, home, tmp_path_factory):
    """Folders of runs of six steps of 16 samples: on one process, on two, and begun on the other number."""
    folder = tmp_path_factory.mktemp("muon")

    def arguments(name, *more):
        return chain.arguments("autoencoder", *SETTINGS, f"--run={folder / name}", *more)

    with contextlib.chdir(home):
        assert fit.main(arguments("one", *ONE)) == 0
    second = {"start": str(folder / "one" / HALF), "run": str(folder / "one two")}
    plan = [{"arguments": arguments("two", *TWO)}, {**second, "arguments": arguments("one two", *TWO)}]
    fit_all(plan, folder / "plan.json", home)
    start = folder / "two one" / "checkpoints" / "last.ckpt"
    start.parent.mkdir(parents=True)
    start.write_bytes((folder / "two" / HALF).read_bytes())
    with contextlib.chdir(home):
        assert fit.main(arguments("two one", *ONE)) == 0
    return folder


def saved(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def distance(one, two):
    """Norm of the difference of tensors of the same names, relative to the norm of all."""
    assert one.keys() == two.keys() and len(one) > 10
    pairs = [(one[name].double(), two[name].double()) for name in one]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


def moments(checkpoint, name):
    states = checkpoint["optimizer_states"][0]["state"]
    return {i: state[name] for i, state in states.items() if name in state}


def skipped(run):
    with (run / "metrics.csv").open(newline="") as file:
        found = [row["train/skipped_steps"] for row in csv.DictReader(file)]
    return [float(value) for value in found if value]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["two", "two one", "one two"])
def test_six_steps_of_which_two_are_skipped_are_those_of_one_process(runs, other):
    one, two = saved(runs / "one"), saved(runs / other)
    assert one["progress"] == two["progress"] == {"steps": 6, "samples": 96}
    assert one["callbacks"]["SkipNonFinite"] == two["callbacks"]["SkipNonFinite"]
    assert one["callbacks"]["SkipNonFinite"]["num_skipped"] == 2
    assert distance(one["state_dict"], two["state_dict"]) < 1e-5
    for name in ("momentum", "first", "second"):
        assert distance(moments(one, name), moments(two, name)) < 1e-4, name
    steps = [state["step"] for state in two["optimizer_states"][0]["state"].values() if "step" in state]
    assert set(steps) == {4}  # of Adam, which embeddings and vectors have
    assert skipped(runs / other)[-3:] == skipped(runs / "one")[-3:]


@pytest.mark.slow
def test_skipped_steps_are_counted_where_they_were(runs):
    assert skipped(runs / "one") == skipped(runs / "two") == [0, 1, 1, 1, 2, 2]
