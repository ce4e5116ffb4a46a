"""Runs whose blocks are computed again or compiled are the same runs."""

import csv

import pytest
import torch

from ldm import fit

pytestmark = pytest.mark.slow

RECOMPUTE = "--trainer.callbacks+=ldm.callbacks.activation_checkpointing.ActivationCheckpointing"
COMPILE = ["--trainer.callbacks+=ldm.callbacks.compile.Compile", "--trainer.callbacks.backend=aot_eager"]
COMPILE += ["--trainer.callbacks.on_cpu=true"]


def weights(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    raw = checkpoint["callbacks"]["EMA"]["raw"]
    return {**checkpoint["state_dict"], **{f"raw {name}": weight for name, weight in raw.items()}}


def losses(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("stage", ["autoencoder", "clip", "diffusion"])
def test_a_run_that_computes_its_blocks_again_ends_with_the_same_weights(chain, fresh, stage):
    assert fit.main(fresh.arguments(stage, RECOMPUTE)) == 0
    ours, theirs = weights(fresh.runs / stage), weights(chain.runs / stage)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_a_compiled_run_continues_a_plain_one(chain, fresh):
    assert fit.main(fresh.arguments("diffusion", "--trainer.max_steps=4")) == 0
    assert fit.main(fresh.arguments("diffusion", *COMPILE)) == 0
    assert losses(fresh.runs / "diffusion") == pytest.approx(losses(chain.runs / "diffusion"), rel=1e-4)
    assert weights(fresh.runs / "diffusion").keys() == weights(chain.runs / "diffusion").keys()
