"""slurm/fit.sbatch on a real SLURM: two nodes train to the end, and so does a job that is queued again."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("state_dict", "optimizer_states", "samples_seen", "Shards")


def submit(cluster, shards, run, steps=40):
    """Adapt the script by options of sbatch and ldm.fit alone."""
    cluster.environment["PYTHON"] = sys.executable
    cluster.environment["PYTHONPATH"] = str(ROOT)
    options = {
        "run": run,
        "wandb.mode": "disabled",
        "data.train": shards / "train-{000000..000002}.tar",
        "data.val": shards / "val-000000.tar",
        "data.batch_size": 4,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "preemption.every_n_steps": 1,
        "pictures.num": 2,
    }
    return cluster.submit(
        "--nodes=2", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={run}.log",
        str(ROOT / "slurm" / "fit.sbatch"), "--config", "configs/demo/autoencoder.yaml",
        *(f"--{key}={value}" for key, value in options.items()),
    )  # fmt: skip


def finish(cluster, job, run):
    state = cluster.wait(job)
    assert state == "COMPLETED", Path(f"{run}.log").read_text()
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture(scope="session")
def whole(cluster, shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return finish(cluster, submit(cluster, shards, run), run)


@pytest.mark.slow
def test_two_nodes_train_to_the_end(whole):
    assert whole["global_step"] == 40
    assert whole["samples_seen"] == 40 * 2 * 4


@pytest.mark.slow
def test_a_job_that_gets_usr1_is_queued_again_and_ends_like_an_uninterrupted_one(
    cluster, shards, whole, tmp_path
):
    run = tmp_path / "run"
    job = submit(cluster, shards, run)
    metrics = run / "metrics.csv"
    cluster.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 60)
    cluster.run("scancel", "--signal=USR1", job)
    resumed = finish(cluster, job, run)
    log = Path(f"{run}.log").read_text()
    assert "by SIGUSR1: the same command resumes" in log
    assert f"resumes {run}/checkpoints/last.ckpt" in log
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    for part in PARTS:
        assert equal(resumed[part], whole[part]), part
    steps = [line.split(",")[0] for line in metrics.read_text().splitlines()[1:]]
    assert sorted(set(steps), key=int) == [str(step) for step in range(40)]
