"""slurm/sweep.sbatch: each task of an array trains with a line of its own, and is queued again alone."""

import pytest
import yaml
from jobs import ROOT, STEPS, WAITS, Job, options

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
