"""torchrun without SLURM: it sets the number of processes and forwards signals."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import ROOT

from ldm import fit


def torchrun(fresh, *more):
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    slow = ["--data.batch_size=4", "--sample_grid.num=2", "--preemption.every_n_steps=1", *more]
    return subprocess.Popen(
        [*command, "-m", "--", "ldm.fit", *fresh.arguments("autoencoder", *slow)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_one_model_and_a_repeated_command_resumes_it(fresh):
    long = ["--trainer.max_steps=40", "--trainer.val_check_interval=40"]
    run = fresh.runs / "autoencoder"
    first = torchrun(fresh, *long)
    end = time.monotonic() + 200
    while not (run / "metrics.csv").exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 1  # torchrun's own, whatever its processes ended with
    assert "by SIGTERM: the same command resumes" in output
    second = torchrun(fresh, *long)
    output = second.communicate(timeout=200)[0]
    assert second.returncode == 0, output
    assert output.count("resumes") == 1
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["global_step"], last["progress"]["samples"]) == (40, 40 * 2 * 4)


@pytest.mark.parametrize(
    ("option", "started"), [("--trainer.devices=3", "2"), ("--trainer.num_nodes=4", "2")]
)
def test_another_number_of_processes_than_torchrun_started_is_refused(
    fresh, capsys, monkeypatch, option, started
):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert fit.main(fresh.arguments("autoencoder", option)) == 2
    name, got = option.removeprefix("--").split("=")
    assert f"{name}: got {got}, but torchrun started {started}: leave it out" in capsys.readouterr().err
