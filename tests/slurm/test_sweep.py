"""Sweeps on a SLURM: slurm/sweep.sbatch, each task of an array a line; agents of W&B, each task a trial."""

import json
import sys

import pytest
import yaml
from jobs import ROOT, STEPS, WAITS, Job, options
from wandb_server import Server, Sweep

from ldm.io.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


def submit(cluster, shards, folder, tasks):
    """Submit a sweep over two learning rates; the second task waits in a step for a signal."""
    lines = ["--model.optimizer.lr=0.001", f"--model.optimizer.lr=0.002 {' '.join(WAITS)}"]
    (folder / "rates.txt").write_text("\n".join(lines) + "\n")
    array = cluster.submit(
        f"--array={tasks}", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={folder}/%a.log",
        f"--export=ALL,SWEEP_RUNS={folder}", str(ROOT / "slurm" / "sweep.sbatch"), f"{folder}/rates.txt",
        "--config", "configs/demo/autoencoder.yaml", *options(shards),
    )  # fmt: skip
    return array, lambda task: Job(cluster, f"{array}_{task}", folder / str(task))


def test_a_task_trains_with_its_line_and_is_queued_again_alone(cluster, shards, tmp_path):
    array, task = submit(cluster, shards, tmp_path, "0-1")
    task(1).wait_for_steps(6)
    assert task(1).fields["JobId"] == array  # which SLURM takes for all tasks, where it can
    cluster.run("scancel", "--signal=USR1", task(1).number)
    for number, rate in enumerate((0.001, 0.002)):
        assert task(number).finish()["global_step"] == STEPS
        config = yaml.safe_load((tmp_path / str(number) / "config.yaml").read_text())
        assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    assert [task(number).restarts for number in (0, 1)] == [0, 1]


def test_a_task_without_a_line_is_refused(cluster, shards, tmp_path):
    _, task = submit(cluster, shards, tmp_path, "2")
    assert cluster.wait(task(2).number) == "FAILED"
    assert "rates.txt has 2 lines, expected one for task 2 of --array" in task(2).log


def test_agents_in_an_array_train_each_trial_once_in_a_folder_of_its_own(cluster, shards, tmp_path):
    """As docs/comparing-runs.md submits them, with the real agent, and the stand-in for W&B's server."""
    rates = {"t1": 0.01, "t2": 0.02}
    config = yaml.safe_load((ROOT / "docs" / "sweep.yaml").read_text())
    short = [*options(shards), "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    folder = [f"--run={tmp_path / 'sweep'}", "--wandb.mode=online"]
    config["command"] = [*config["command"][:-3], *short, *folder, config["command"][-1]]
    with Server() as server:
        trials = [(name, {"model.optimizer.lr": rate}) for name, rate in rates.items()]
        server.sweeps["s"] = Sweep(json.dumps(config), list(trials))
        path = f"{sys.prefix}/bin:{cluster.environment['PATH']}"  # the agent starts the python that it finds
        variables = {**server.environment, "HOME": str(tmp_path), "PATH": path}
        export = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        agent = "wandb agent --count 1 me/ldm/s"
        array = cluster.submit(
            "--array=0-1", "--cpus-per-task=1", f"--chdir={tmp_path}", f"--output={tmp_path}/%a.log",
            f"--export={export}", f"--wrap={agent}",
        )  # fmt: skip
        for task in (0, 1):
            log = tmp_path / f"{task}.log"
            assert cluster.wait(f"{array}_{task}", 400) == "COMPLETED", log.read_text()
        assert sorted(server.agents.values()) == [["t1"], ["t2"]]  # no trial twice
        assert {path.name for path in (tmp_path / "sweep").iterdir()} == set(server.runs) == set(rates)
        for name, rate in rates.items():
            assert Checkpoint.open(tmp_path / "sweep" / name).progress.steps == 2
            run = server.runs[name]
            assert run.settings["model.optimizer.lr"] == rate and run.attributes["sweep"] == "s"
            assert run.exits == [0] and [row["trainer/global_step"] for row in run.rows] == [0, 1]
