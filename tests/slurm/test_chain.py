"""slurm/chains/demo.sh: every job after those that it needs, from packing to the evaluation's figures."""

import importlib.util
import json
import os
import subprocess

import pytest
from jobs import ROOT, Job

from ldm import fit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # six jobs one after another, on two cores

FIT = (
    "--wandb.mode=disabled --data.batch_size=4 --trainer.max_steps=4 --trainer.val_check_interval=4 "
    "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.log_every_n_steps=1 --sample_grid.num=2"
)
SHAPES = "--data.train=shards/shapes/train-*.tar"
WAITS = "--trainer.callbacks+=waiting.UntilSignalled --trainer.callbacks.step=2"
LATENTS = "--data.train=shards/shapes-latents/train-*.tar --model.sampler.num_steps=2"
SMALL = {
    "pack_args": "--train=40 --val=20 --novel=12 --pairs=12 --shard-size=20 --workers=1",
    "autoencoder_args": f"{FIT} {SHAPES} {WAITS}",
    "clip_args": f"{FIT} {SHAPES}",
    "encode_sbatch": "--nodes=2",
    "encode_args": "--device=cpu",
    "diffusion_args": f"{FIT} {LATENTS}",
    "evaluation_sbatch": "--nodes=2",
    "evaluation_args": "--device=cpu --num-images=4 --steps=2",
}
BEFORE = {
    "autoencoder": ["pack"],
    "clip": ["pack"],
    "encode": ["autoencoder"],
    "diffusion": ["encode", "clip"],
    "evaluation": ["diffusion", "clip"],
    "chain": ["evaluation"],
}


def submit(cluster, folder, changes):
    """Submit the chain from a folder of its own, and return its jobs by name."""
    for name in ("slurm", "configs"):
        (folder / name).symlink_to(ROOT / name)
    subprocess.run(
        ["slurm/chains/demo.sh", "--cpus-per-task=1", "--time=10", "--output=%x.log"],
        cwd=folder, env={**cluster.environment, **changes}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line.split() for line in cluster.run("squeue", "-h", "-o", "%i %j %Z").splitlines()]
    jobs = {
        name: Job(cluster, number, folder / name) for number, name, where in lines if where == str(folder)
    }
    assert set(jobs) == {"ldm-pack", *(f"ldm-{name}" for name in BEFORE)}
    return {name.removeprefix("ldm-"): job for name, job in jobs.items()}


def test_a_chain_runs_in_order_to_its_figures_though_a_job_is_queued_again(cluster, tmp_path):
    jobs = submit(cluster, tmp_path, SMALL)
    steps = tmp_path / "runs/demo/autoencoder/metrics.csv"
    cluster.wait_for(lambda: steps.exists() and steps.read_text().count("\n") > 1, 240)
    cluster.run("scancel", "--signal=USR1", jobs["autoencoder"].number)
    assert cluster.wait(jobs["chain"].number, 400) == "COMPLETED", logs(tmp_path)
    assert jobs["autoencoder"].restarts == 1
    for name, needed in BEFORE.items():
        for before in needed:
            assert jobs[before].fields["EndTime"] <= jobs[name].fields["StartTime"]
    (result,) = json.loads((tmp_path / "runs/demo/evaluation/evaluation.json").read_text())["results"]
    assert {"fid/clip", "clip_score/clip"} <= {value["name"] for value in result["values"]}
    lines = jobs["chain"].log.splitlines()
    assert [line.split()[-1] for line in lines] == ["COMPLETED"] * 6 + ["done"]


def test_a_stage_that_fails_ends_the_chain_with_a_message(cluster, tmp_path):
    jobs = submit(cluster, tmp_path, {**SMALL, "pack_args": "--size=1"})
    assert cluster.wait(jobs["chain"].number) == "FAILED"
    assert {name: cluster.state(job.number) for name, job in jobs.items()} == {
        **dict.fromkeys(jobs, "CANCELLED"), "pack": "FAILED", "chain": "FAILED",
    }  # fmt: skip
    assert f"error: the chain ended at pack, see {tmp_path}/ldm-pack.log; what waited" in jobs["chain"].log
    assert "--size" in jobs["pack"].log


def test_half_a_chain_is_not_submitted(cluster, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        submit(cluster, tmp_path, {**SMALL, "diffusion_sbatch": "--partition=nowhere"})
    assert "sbatch refused a job of the chain" in refused.value.stderr
    cluster.wait_for(lambda: str(tmp_path) not in cluster.run("squeue", "-h", "-o", "%Z"))


@pytest.mark.parametrize("name", ["demo", "images"])
def test_every_stage_gets_its_options_and_a_command_that_exists(name, tmp_path):
    """With a stand-in for sbatch that numbers jobs from 1 and writes down its arguments."""
    log = tmp_path / "asked"
    program = tmp_path / "sbatch"
    program.write_text(f'#!/bin/sh\nprintf "%s\\t" "$@" >> {log}\necho >> {log}\nwc -l < {log}\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "clip_sbatch": "--nodes=3"}
    command = [ROOT / "slurm" / "chains" / f"{name}.sh", "--nodes=2"]
    subprocess.run(command, env={**environment, "clip_args": "--seed_everything=7"}, check=True)
    jobs = [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]
    *stages, report = [[word for word in job if not word.startswith("--output")] for job in jobs]
    begin = ["--parsable", "--job-name=ldm-clip", "--nodes=2"]
    after = ["--dependency=afterok:1", "--kill-on-invalid-dep=yes", "--nodes=3"]
    assert stages[2][:6] == [*begin, *after]  # of two, sbatch takes the last
    assert stages[2][-1] == "--seed_everything=7"
    assert "--dependency=afterok:4:3" in stages[4]
    assert "--dependency=afterany:1:2:3:4:5:6" in report
    for words in stages:
        (script,) = (word for word in words if word.startswith("slurm/"))
        command = words[words.index(script) + 1 :]
        if script == "slurm/fit.sbatch":
            assert fit.main([*command, "--print_config"]) == 0
        else:
            assert importlib.util.find_spec(command[1]), command


def logs(folder):
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
