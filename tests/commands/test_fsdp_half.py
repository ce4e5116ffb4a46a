"""FSDP2 with bfloat16 weights (two processes of gloo): float32 masters, checkpoints of the same format."""

import contextlib

import pytest
import torch
from one_after_another import fit_all

from ldm import fit

HALF = ["--trainer.strategy=ldm.distributed.FSDP2", "--trainer.strategy.weights=bfloat16"]
SETTINGS = [
    "--model.optimizer.class_path=exact.SGD",
    "--model.optimizer.lr=0.1",
    "--model.optimizer.warmup=1",
    "--model.optimizer.decay=none",
    "--trainer.precision=bf16-mixed",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=2",
    "--ema.decay=0.5",
    "--watchdog.timeout=120",
]
TWO = [*SETTINGS, "--trainer.devices=2", "--data.batch_size=4"]


def saved(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def distance(one, two):
    """Norm of the difference of tensors of the same names, relative to the norm of all."""
    pairs = [(one[name].double(), two[name].double()) for name in one]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


def change(start, end):
    return {name: end[name] - start[name] for name in end}


@pytest.mark.slow
def test_weights_in_bfloat16_train_like_float32_ones_and_resume_on_one_process(chain, home, tmp_path):
    strategies = {"whole": ["--trainer.strategy=fsdp2"], "half": HALF}
    plan = [
        {"arguments": chain.arguments("diffusion", *TWO, *strategy, f"--run={tmp_path / name}")}
        for name, strategy in strategies.items()
    ]
    result = fit_all(plan, tmp_path / "plan.json", home)
    assert "cannot be drawn" not in result.stderr
    whole, half = saved(tmp_path / "whole"), saved(tmp_path / "half")
    for key in ("state_dict", "raw"):
        one, two = (x["callbacks"]["EMA"]["raw"] if key == "raw" else x[key] for x in (whole, half))
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
            k: (v.shape, v.dtype) for k, v in two.items()
        }
        assert 0 < distance(one, two) < 1e-3
    with contextlib.chdir(home):
        more = ["--trainer.max_steps=6", f"--run={tmp_path / 'half'}"]
        assert fit.main(chain.arguments("diffusion", *SETTINGS, *more)) == 0
    assert saved(tmp_path / "half")["progress"] == {"steps": 6, "samples": 48}


def test_weights_in_bfloat16_are_refused_where_the_network_computes_in_float32(fresh, capsys):
    assert fit.main(fresh.arguments("autoencoder", *HALF, "--trainer.devices=1")) == 2
    error = capsys.readouterr().err
    assert "trainer.strategy.weights: got bfloat16 with trainer.precision=32-true" in error
    assert "expected bf16-mixed, or float32 weights" in error
