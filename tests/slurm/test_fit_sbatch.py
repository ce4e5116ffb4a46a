"""slurm/fit.sbatch on a real SLURM: two nodes train to the end, however often the job is queued again."""

import sys
from pathlib import Path

import pytest
from jobs import STEPS, WAITS, assert_like, submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # one fixture starts all jobs, on two cores


@pytest.fixture(scope="session")
def jobs(cluster, shards, tmp_path_factory):
    """One job that goes through, others that are interrupted; all at once, for each of them mostly waits."""
    folder = tmp_path_factory.mktemp("runs")

    def start(name, sbatch=(), fit=()):
        return submit(cluster, shards, folder / name, sbatch, fit)

    jobs = {"twice": start("twice", fit=[*WAITS, "--trainer.callbacks.restart=1"])}
    cluster.wait_for(lambda: num_processes(jobs["twice"]) == 2)
    cluster.run("scancel", "--signal=USR1", jobs["twice"].number)
    assert jobs["twice"].log == ""
    jobs["limited"] = start("limited", ["--time=2", "--signal=USR1@60"], WAITS)  # sent 30 s early
    jobs["whole"] = start("whole")
    jobs["signalled"] = start("signalled", fit=WAITS)
    jobs["preempted"] = start("preempted", ["--partition=shared"], WAITS)
    for name in ("signalled", "preempted", "twice"):
        jobs[name].wait_for_steps(6)
    cluster.run("scancel", "--signal=USR1", jobs["signalled"].number)
    cluster.run("scontrol", "requeue", jobs["twice"].number)
    return jobs


@pytest.fixture(scope="session")
def urgent(cluster, jobs, tmp_path_factory):
    """A job that needs the nodes of the preempted one."""
    output = f"--output={tmp_path_factory.mktemp('urgent')}/log"
    return cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", output, "--wrap=sleep 1")


@pytest.fixture(scope="session")
def uninterrupted(jobs, urgent):
    return jobs["whole"].finish()


def test_two_nodes_train_to_the_end(jobs, uninterrupted):
    assert uninterrupted["global_step"] == STEPS
    assert uninterrupted["progress"]["samples"] == STEPS * 2 * 2
    assert jobs["whole"].restarts == 0


def test_usr1_queues_a_job_again(jobs, uninterrupted):
    job = jobs["signalled"]
    assert_like(job, uninterrupted)
    assert job.restarts == 1
    assert "by SIGUSR1: the same command resumes" in job.log
    assert f"resumes {job.run}/checkpoints/last.ckpt" in job.log


def test_usr1_while_python_starts_is_not_lost(jobs, uninterrupted):
    assert_like(jobs["twice"], uninterrupted)
    assert "stopped at step 0 by SIGUSR1" in jobs["twice"].log


def test_an_operators_requeue_resumes(jobs, uninterrupted):
    assert_like(jobs["twice"], uninterrupted)
    assert jobs["twice"].restarts == 2
    assert "by SIGTERM: the same command resumes" in jobs["twice"].log


def test_a_job_of_a_higher_partition_drives_it_out_and_it_resumes(cluster, jobs, uninterrupted, urgent):
    assert cluster.wait(urgent) == "COMPLETED"
    assert_like(jobs["preempted"], uninterrupted)
    assert jobs["preempted"].restarts == 1
    assert "by SIGUSR1: the same command resumes" in jobs["preempted"].log


def test_before_its_time_limit_a_job_is_queued_again(jobs, uninterrupted):
    assert_like(jobs["limited"], uninterrupted)
    assert jobs["limited"].restarts >= 1
    assert "by SIGUSR1: the same command resumes" in jobs["limited"].log
    assert "TIME LIMIT" not in jobs["limited"].log


def test_a_finished_job_that_is_queued_again_ends_at_once(cluster, jobs, uninterrupted):
    job = jobs["whole"]
    before = (job.run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    cluster.run("scontrol", "requeue", job.number)
    cluster.wait_for(lambda: job.restarts == 1)
    job.finish()
    assert f"finished, {STEPS} of {STEPS} steps are done" in job.log
    assert (job.run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_a_head_node_that_does_not_resolve_is_an_error_at_once(cluster, shards, tmp_path):
    job = submit(cluster, shards, tmp_path / "run", ["--export=ALL,MASTER_ADDR=head.invalid"])
    assert cluster.wait(job.number) == "FAILED"
    assert " cannot resolve MASTER_ADDR=head.invalid, where the processes meet: set it to" in job.log


def num_processes(job):
    """Number of Python processes of the job."""
    commands = [words(path / "cmdline") for path in Path("/proc").iterdir() if path.name.isdigit()]
    return sum(command[0] == sys.executable and f"--run={job.run}" in command for command in commands)


def words(path):
    try:
        return path.read_text().split("\0")
    except OSError:  # it ended meanwhile
        return [""]
