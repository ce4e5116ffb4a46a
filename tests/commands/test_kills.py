"""One process of two dies or is signalled: all end with its message, and the same command resumes."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from comparing import assert_same_run, state
from interruptions import signalled
from one_after_another import fit_all
from tiny_runs import ROOT, SUPPORT, Chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # one fixture runs all, on two cores

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--sample_grid.num=2"]


def dies(rank, how):
    what = ["interruptions.Dies", "--trainer.callbacks.step=5", f"--trainer.callbacks.rank={rank}"]
    return ["--trainer.callbacks+", *what, f"--trainer.callbacks.how={how}"]


ENDS = {
    "second fails": dies(1, "error"),
    "second is killed": dies(1, "kill"),
    "first fails": dies(0, "error"),
    "second is told": ["--preemption.every_n_steps=3", *signalled(4, "backward", signal.SIGUSR1, rank=1)],
}


@pytest.fixture(scope="module")
def runs(chain, home, tmp_path_factory):
    """Runs on two processes, one uninterrupted, the others ended and resumed, with their outputs."""
    folder = tmp_path_factory.mktemp("two")

    def arguments(name):
        return Chain(folder / name, chain.shards, chain.latents).arguments("autoencoder", *TWO)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{SUPPORT}"}
    ended = {}
    for name, end in ENDS.items():
        command = [sys.executable, "-m", "ldm.fit", *arguments(name), *end]
        ended[name] = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    stopped = state(folder / "second is told" / "autoencoder")["global_step"]
    plan = [{"arguments": arguments(name)} for name in ("whole", *ENDS)]
    resumed = fit_all(plan, folder / "plan.json", home)
    return SimpleNamespace(folder=folder, ended=ended, stopped=stopped, output=resumed.stdout)


@pytest.mark.parametrize("name", ENDS)
def test_the_same_command_resumes_a_run_that_one_of_two_processes_ended(runs, name):
    assert runs.ended[name].returncode != 0
    run = runs.folder / name / "autoencoder"
    assert f"{run}: resumes {run / 'checkpoints' / 'last.ckpt'}" in runs.output
    assert_same_run(run, runs.folder / "whole" / "autoencoder")


@pytest.mark.parametrize(("name", "rank"), [("second fails", 1), ("first fails", 0)])
def test_the_error_of_one_process_is_reported(runs, name, rank):
    assert f"process {rank} went away" in runs.ended[name].stderr


def test_a_signal_to_one_process_stops_all_at_the_same_step(runs):
    stopped = runs.ended["second is told"]
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped at step 6 by SIGUSR1" in stopped.stdout
    assert runs.stopped == 6
