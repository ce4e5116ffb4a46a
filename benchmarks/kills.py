"""Does a run survive being killed at any moment? ``python -m benchmarks.kills``.

Two processes train a small autoencoder, are killed again and again at random moments, and are started again
by the same command. In the end everything must be as in a run that nobody disturbed, bit for bit: weights,
average, optimizer, order of the data, metrics.csv. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.shapes.packer import Settings, pack

PARTS = (
    *("state_dict", "callbacks", "optimizer_states", "lr_schedulers", "Shards"),
    "progress",
)
"""Of a checkpoint, that must be equal."""
TIMES = ("data_wait", "images_per_second", "step_seconds")
"""Columns of metrics.csv that never are."""
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Job:
    """A run of two processes, and what happens to it.

    Args:
        folder: Of the run.
        shards: To train on.
        steps: Optimizer steps of the whole run.
    """

    folder: Path
    shards: Path
    steps: int

    def start(self) -> subprocess.Popen[bytes]:
        """Start both processes, by the same command every time."""
        options = {
            "run": self.folder,
            "wandb.mode": "disabled",
            "data.train": self.shards / "train-{000000..000002}.tar",
            "data.val": self.shards / "val-000000.tar",
            "data.batch_size": 4,
            "trainer.max_steps": self.steps,
            "trainer.val_check_interval": 10,
            "trainer.log_every_n_steps": 1,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.devices": 2,
            "sample_grid.num": 2,
            "preemption.every_n_steps": 3,
        }
        command = [sys.executable, "-m", "ldm.fit", "--config", "configs/demo/autoencoder.yaml"]
        return subprocess.Popen(
            [*command, *(f"--{key}={value}" for key, value in options.items())],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=(self.folder.parent / "log").open("ab"),
            stderr=subprocess.STDOUT,
        )

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "checkpoints"

    @property
    def rows(self) -> int:
        """How many steps its metrics.csv knows."""
        path = self.folder / "metrics.csv"
        return path.read_text().count("\n") if path.exists() else 0

    def state(self) -> dict[str, Any]:
        """Read its newest checkpoint."""
        state: dict[str, Any] = torch.load(self.checkpoints / "last.ckpt", weights_only=True)
        return state

    def metrics(self) -> list[dict[str, str]]:
        """Read what it logged, without times."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]


def ranks(main: subprocess.Popen[bytes]) -> list[int]:
    """List both processes; the second is a child of the first."""
    children = Path(f"/proc/{main.pid}/task/{main.pid}/children")
    mine = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [main.pid, *(pid for pid in mine if b"ldm.fit" in Path(f"/proc/{pid}/cmdline").read_bytes())]


def trains(job: Job, process: subprocess.Popen[bytes]) -> bool:
    """Wait until a new step is logged; return whether it is still running."""
    before, end = job.rows, time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if job.rows > before:
            return True
        time.sleep(0.05)
    return False


def at_random(job: Job, process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Wait for some moment of training."""
    if trains(job, process):
        time.sleep(chance.uniform(0, 3))


def at_start(job: Job, process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Wait for some moment before training."""
    time.sleep(chance.uniform(0.5, 6))


def at_writing(job: Job, process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """Wait until a checkpoint is being written."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if any(job.checkpoints.glob("*.tmp-*")):
            return


Moment = Callable[[Job, "subprocess.Popen[bytes]", random.Random], None]
KINDS: dict[str, tuple[Moment, signal.Signals, slice]] = {
    "SIGKILL, first process": (at_random, signal.SIGKILL, slice(0, 1)),
    "SIGKILL, second process": (at_random, signal.SIGKILL, slice(1, 2)),
    "SIGKILL, both": (at_random, signal.SIGKILL, slice(0, 2)),
    "SIGKILL, both, while a checkpoint is written": (at_writing, signal.SIGKILL, slice(0, 2)),
    "SIGKILL, both, before training": (at_start, signal.SIGKILL, slice(0, 2)),
    "SIGTERM": (at_random, signal.SIGTERM, slice(0, 1)),
    "SIGUSR1, second process": (at_random, signal.SIGUSR1, slice(1, 2)),
}
"""When, what, and whom."""


def kill(job: Job, kind: str, chance: random.Random) -> str:
    """Start the job, end it in one of the ways, and say how it went."""
    moment, number, whom = KINDS[kind]
    process = job.start()
    moment(job, process, chance)
    for pid in ranks(process)[whom]:
        os.kill(pid, number)
    code = process.wait(120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what outlives its first process
    left = len(list(job.checkpoints.glob("*.tmp-*")))
    return f"| {kind} | {max(0, job.rows - 1)} | {code} | {left} |"


def sequence(count: int, chance: random.Random) -> Iterator[str]:
    """Draw kinds, each about as often, in any order."""
    kinds = [*KINDS] * -(-count // len(KINDS))
    chance.shuffle(kinds)
    yield from kinds[:count]


def finish(job: Job) -> None:
    """Let the job run to its end.

    Raises:
        RuntimeError: If it fails.
    """
    if code := job.start().wait(1800):
        raise RuntimeError(f"exit code {code}: {(job.folder.parent / 'log').read_text()[-3000:]}")


def differences(one: Any, two: Any, path: str) -> Iterator[str]:
    """Name what is not equal."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one.nan_to_num(7), two.nan_to_num(7)):
            yield path
    elif isinstance(one, dict) and one.keys() == two.keys():
        for key in one:
            yield from differences(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) and len(one) == len(two):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif one != two:
        yield path


def compare(ours: Job, theirs: Job) -> list[str]:
    """Name what is not as it should be."""
    one, two = ours.state(), theirs.state()
    wrong = [name for part in PARTS for name in differences(one[part], two[part], part)]
    wrong += differences(ours.metrics(), theirs.metrics(), "metrics.csv")
    return wrong + [f"left: {path.name}" for path in ours.checkpoints.glob("*.tmp-*")]


def main() -> int:
    """Print a row per kill and what differs in the end; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name), Path(name) / "shards"
        pack(shards, Settings(train=60, val=24, novel=12, pairs=12, shard_size=20))
        killed, whole = (Job(folder / n / "run", shards, options.steps) for n in ("killed", "whole"))
        for job in (killed, whole):
            job.folder.parent.mkdir()
        print("| killed by | steps logged | exit code | unfinished files |\n|---|---|---|---|", flush=True)
        for kind in sequence(options.kills, chance):
            print(kill(killed, kind, chance), flush=True)
        finish(killed)
        finish(whole)
        wrong = compare(killed, whole)
    print(
        f"\n{options.kills} kills, seed {options.seed}, {options.steps} steps; differences: {wrong or 'none'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
