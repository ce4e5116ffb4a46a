"""Jobs of slurm/fit.sbatch on the cluster, adapted by options of sbatch and ldm.fit alone."""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent
STEPS = 12
STATE_KEYS = ("state_dict", "optimizer_states", "progress", "Shards")
"""Entries of a checkpoint that interruptions must not change."""
WAITS = ("--trainer.callbacks+=waiting.UntilSignalled", "--trainer.callbacks.step=6")


@dataclass(frozen=True)
class Job:
    """A job that was submitted.

    Args:
        number: SLURM's.
        run: Folder of the run.
    """

    cluster: Cluster
    number: str
    run: Path

    @property
    def log(self) -> str:
        path = Path(f"{self.run}.log")
        return path.read_text() if path.exists() else ""

    @property
    def fields(self) -> dict[str, str]:
        """Fields of ``scontrol show job``."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])

    def rows(self) -> list[dict[str, str]]:
        """Rows of metrics.csv so far."""
        path = self.run / "metrics.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    def wait_for_steps(self, count: int) -> None:
        try:
            self.cluster.wait_for(lambda: len(self.rows()) >= count, 240)  # ten processes import at once
        except AssertionError:
            raise AssertionError(f"{len(self.rows())} steps\n{self.log}\n{self.fields}") from None

    def finish(self) -> dict:
        """Wait for its end, and return the last checkpoint."""
        state = self.cluster.wait(self.number, 300)
        assert state == "COMPLETED", f"{state}\n{self.log}\n{self.fields}"
        return torch.load(self.run / "checkpoints" / "last.ckpt", weights_only=True)


def submit(cluster: Cluster, shards: Path, run: Path, sbatch=(), fit=()) -> Job:
    """Train the demo's autoencoder on two nodes."""
    number = cluster.submit(
        "--nodes=2", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={run}.log", *sbatch,
        str(ROOT / "slurm" / "fit.sbatch"), "--config", "configs/demo/autoencoder.yaml",
        f"--run={run}", *options(shards), *fit,
    )  # fmt: skip
    return Job(cluster, number, run)


def options(shards: Path) -> list[str]:
    """Options of ldm.fit for twelve quick steps."""
    settings = {
        "wandb.mode": "disabled",
        "data.train": shards / "train-{000000..000002}.tar",
        "data.val": shards / "val-000000.tar",
        "data.batch_size": 2,
        "trainer.max_steps": STEPS,
        "trainer.val_check_interval": STEPS,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "preemption.every_n_steps": 1,
        "sample_grid.num": 2,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def assert_like(job: Job, expected: dict) -> None:
    """A job ends like an uninterrupted one: the same weights, every step once."""
    resumed = job.finish()
    for part in STATE_KEYS:
        assert equal(resumed[part], expected[part]), part
    steps = [int(row["step"]) for row in job.rows() if row["train/loss"]]
    assert steps == list(range(STEPS))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
