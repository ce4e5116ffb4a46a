"""A process that dies takes the others with it, promptly and with its own error; the same command resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import assert_same_run
from tiny_runs import ROOT, Chain


def run(arguments, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [sys.executable, "-m", "ldm.fit", *arguments, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def two(chain):
    both = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4", "--pictures.num=2"]
    return chain.arguments("autoencoder", *both)


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    uninterrupted = Chain(tmp_path_factory.mktemp("whole"), chain.shards, chain.latents)
    result = run(two(uninterrupted))
    assert result.returncode == 0, result.stderr
    return uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(1, "error"), (1, "kill"), (0, "error")])
def test_the_death_of_one_process_ends_all_and_the_same_command_resumes(whole, fresh, rank, how):
    dies = ["interruptions.Dies", "--trainer.callbacks.step=5", f"--trainer.callbacks.rank={rank}"]
    dead = run(two(fresh), "--trainer.callbacks+", *dies, f"--trainer.callbacks.how={how}")
    assert dead.returncode != 0
    if how == "error":
        assert f"process {rank} went away" in dead.stderr
    resumed = run(two(fresh))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes" in resumed.stdout
    assert_same_run(fresh.runs / "autoencoder", whole.runs / "autoencoder")
