"""Stop + resume = uninterrupted, bit for bit: weights, averages, optimizer, data order, metrics.csv."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from comparing import assert_same_run, metrics, state
from tiny_runs import ROOT, SUPPORT, Chain

from ldm import fit, training


@pytest.mark.parametrize(
    ("name", "step", "where", "resumes_at"),
    [
        ("autoencoder", 5, "start", 5),
        ("autoencoder", 8, "validation", 8),
        pytest.param("autoencoder", 6, "backward", 6, marks=pytest.mark.slow),
        pytest.param("autoencoder", 7, "end", 4, marks=pytest.mark.slow),
        pytest.param("autoencoder", 4, "validation", 4, marks=pytest.mark.slow),
        pytest.param("clip", 5, "start", 5, marks=pytest.mark.slow),
        pytest.param("diffusion", 5, "start", 5, marks=pytest.mark.slow),
        pytest.param("diffusion", 8, "validation", 8, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_uninterrupted(chain, fresh, name, step, where, resumes_at):
    stop = ["--trainer.callbacks+=interruptions.Stop", f"--trainer.callbacks.step={step}"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(fresh.arguments(name, *stop, f"--trainer.callbacks.where={where}"))
    assert state(fresh.runs / name)["global_step"] == resumes_at
    assert fit.main(fresh.arguments(name)) == 0
    assert_same_run(fresh.runs / name, chain.runs / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where"), [("autoencoder", "second"), ("clip", "second"), ("diffusion", "end")]
)
def test_a_run_that_ends_between_accumulated_batches_begins_their_step_again(
    chain, fresh, tmp_path, name, where
):
    accumulated = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=8"]
    uninterrupted = Chain(tmp_path / "uninterrupted", chain.shards, chain.latents)
    assert fit.main(uninterrupted.arguments(name, *accumulated)) == 0
    stop = ["--trainer.callbacks+=interruptions.Stop", "--trainer.callbacks.step=6"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(fresh.arguments(name, *accumulated, *stop, f"--trainer.callbacks.where={where}"))
    assert state(fresh.runs / name)["global_step"] == (6 if where == "second" else 4)
    assert state(fresh.runs / name)["progress"]["samples"] == 16 * (6 if where == "second" else 4)
    assert fit.main(fresh.arguments(name, *accumulated)) == 0
    assert_same_run(fresh.runs / name, uninterrupted.runs / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"), [("autoencoder", (16, 1), (8, 2)), ("diffusion", (6, 2), (4, 3))]
)
def test_a_run_goes_on_with_the_same_samples_in_more_batches(fresh, name, before, after):
    plain = ["--model.optimizer.class_path=exact.SGD", "--model.optimizer.lr=0.1", "--ema.decay=0"]
    plain += ["--model.optimizer.warmup=1", "--model.optimizer.decay=none"]

    def train(folder, steps, batches):
        settings = {
            "run": fresh.runs / folder,
            "data.batch_size": batches[0],
            "trainer.accumulate_grad_batches": batches[1],
            "trainer.val_check_interval": 5 * batches[1],
            "trainer.max_steps": steps,
        }
        assert fit.main(fresh.arguments(name, *plain, *(f"--{k}={v}" for k, v in settings.items()))) == 0

    train("uninterrupted", 10, before)
    train("interrupted", 5, before)
    train("interrupted", 10, after)
    uninterrupted, interrupted = state(fresh.runs / "uninterrupted"), state(fresh.runs / "interrupted")
    assert (
        uninterrupted["progress"]["samples"]
        == interrupted["progress"]["samples"]
        == 10 * before[0] * before[1]
    )
    assert uninterrupted["global_step"] == interrupted["global_step"] == 10
    for key, weight in uninterrupted["state_dict"].items():
        assert torch.allclose(weight, interrupted["state_dict"][key], rtol=1e-5, atol=1e-6), key
    one, two = metrics(fresh.runs / "uninterrupted"), metrics(fresh.runs / "interrupted")
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    losses = [[float(row["val/loss"]) for row in rows if row["val/loss"]] for rows in (one, two)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_steps_are_numbered_on_though_validations_come_at_others(chain, fresh, before, after):
    half = ["--trainer.max_steps=4", f"--trainer.val_check_interval={before}"]
    assert fit.main(fresh.arguments("clip", *half)) == 0
    assert fit.main(fresh.arguments("clip", f"--trainer.val_check_interval={after}")) == 0
    found, expected = (
        [(row["step"], row["train/loss"]) for row in metrics(run / "clip") if row["train/loss"]]
        for run in (fresh.runs, chain.runs)
    )
    assert found == expected and len(found) == 8


def test_a_validation_between_the_batches_of_a_step_is_refused(fresh):
    apart = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=5"]
    with pytest.raises(ValueError, match=r"val_check_interval: got 5 .* a multiple of the 2 of a step"):
        training.fit(fresh.arguments("autoencoder", *apart))


def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(chain, fresh, capsys):
    shutil.copytree(chain.runs / "autoencoder", fresh.runs / "autoencoder")
    last = fresh.runs / "autoencoder" / "checkpoints" / "last.ckpt"
    uninterrupted = bytearray(last.read_bytes())
    uninterrupted[len(uninterrupted) // 2] ^= 1
    last.write_bytes(uninterrupted)
    assert fit.main(fresh.arguments("autoencoder")) == 0
    output = capsys.readouterr()
    assert (
        "last.ckpt' cannot be read" in output.err
        and "resumes" in output.out
        and "previous.ckpt" in output.out
    )
    assert_same_run(fresh.runs / "autoencoder", chain.runs / "autoencoder")


def run_on_two_threads(arguments, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{ROOT}:{SUPPORT}"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that spins takes the processor from the other
    command = [sys.executable, "-m", "ldm.fit", *arguments, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_on_two_threads(chain, fresh, tmp_path):
    uninterrupted = Chain(tmp_path / "uninterrupted", chain.shards, chain.latents)
    assert run_on_two_threads(uninterrupted.arguments("autoencoder")).returncode == 0
    stop = ["interruptions.Stop", "--trainer.callbacks.step=5", "--trainer.callbacks.where=start"]
    stopped = run_on_two_threads(fresh.arguments("autoencoder"), "--trainer.callbacks+", *stop)
    assert "the machine went away" in stopped.stderr
    assert run_on_two_threads(fresh.arguments("autoencoder")).returncode == 0
    assert_same_run(fresh.runs / "autoencoder", uninterrupted.runs / "autoencoder")


def test_the_configuration_wins_over_the_checkpoint(chain, fresh):
    end = ["--trainer.max_steps=12", "--model.optimizer.lr=0.0625", "--model.optimizer.weight_decay=0.5"]
    shutil.copytree(chain.runs / "autoencoder", fresh.runs / "autoencoder")
    assert fit.main(fresh.arguments("autoencoder", *end, "--model.optimizer.decay=none")) == 0
    saved = state(fresh.runs / "autoencoder")
    assert saved["global_step"] == 12
    assert saved["config"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.0625
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.0625
    assert group["weight_decay"] == 0.5


@pytest.mark.slow
def test_a_learning_rate_follows_the_samples_of_a_step_also_when_it_is_resumed(fresh, capsys):
    scaled = ["--model.optimizer.lr=0.01", "--model.optimizer.scaling=SquareRootScaling"]
    scaled += [
        "--model.optimizer.scaling.batch=2",
        "--model.optimizer.decay=none",
        "--model.optimizer.warmup=1",
    ]
    assert fit.main(fresh.arguments("autoencoder", *scaled)) == 0
    assert "8 samples per step, learning rate 0.02" in capsys.readouterr().out
    wider = ["--trainer.accumulate_grad_batches=4", "--trainer.max_steps=10"]
    assert fit.main(fresh.arguments("autoencoder", *scaled, *wider)) == 0
    assert "32 samples per step, learning rate 0.04" in capsys.readouterr().out
    assert state(fresh.runs / "autoencoder")["optimizer_states"][0]["param_groups"][0]["lr"] == 0.04
    rates = [float(row["train/lr"]) for row in metrics(fresh.runs / "autoencoder") if row["train/lr"]]
    assert rates == pytest.approx([0.02] * 8 + [0.04] * 2)
