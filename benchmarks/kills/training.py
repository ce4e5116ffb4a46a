"""A run of two processes that is killed again and again, and one that is not."""

from __future__ import annotations

import csv
import json
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.kills.forks import Command, Processes
from ldm import training
from ldm.io.atomic import MARK
from ldm.stage_protocols import progress_of
from ldm.types import Batch

PARTS = ("state_dict", "callbacks", "optimizer_states", "lr_schedulers", "Shards", "progress", "latent")
"""Of a checkpoint, that must be equal."""
TIMES = ("data_wait", "images_per_second", "step_seconds")
"""Columns of metrics.csv that never are."""
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo" / "autoencoder.yaml"


class Journal(L.Callback):
    """Notes the keys of each step's samples, and when a validation begins and ends.

    Args:
        folder: Where each process writes a file of its own.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, n: int
    ) -> None:
        """Note the samples of the step that begins."""
        self._note(trainer, [progress_of(pl_module).steps, batch["key"]])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note a beginning."""
        self._note(trainer, "validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note an end."""
        self._note(trainer, "end")

    def _note(self, trainer: L.Trainer, what: Any) -> None:
        with (self.folder / f"journal-{trainer.global_rank}").open("a") as file:
            file.write(f"{json.dumps(what)}\n")


@dataclass(frozen=True)
class Run:
    """A run of two processes.

    Args:
        folder: Holds the run and what it prints.
        shards: To train on.
        steps: Optimizer steps of the whole run.
    """

    folder: Path
    shards: Path
    steps: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the command."""
        return {
            "run": self.folder / "run",
            "wandb.mode": "disabled",
            "model.net.block_out_channels": "[8,16]",
            "data.train": self.shards / "train-{000000..000002}.tar",
            "data.val": self.shards / "val-000000.tar",
            "data.batch_size": 4,
            "data.image_size": 16,
            "trainer.max_steps": self.steps,
            "trainer.val_check_interval": 10,
            "trainer.log_every_n_steps": 1,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.devices": 2,
            "sample_grid.num": 2,
            "preemption.every_n_steps": 3,
            "trainer.callbacks+": "benchmarks.kills.training.Journal",
            "trainer.callbacks.folder": self.folder,
        }

    @property
    def command(self) -> Command:
        """The same command every time."""
        arguments = ["--config", str(CONFIG), *(f"--{key}={value}" for key, value in self.options.items())]
        return Command(training.main, arguments, self.folder)

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.folder / "run" / "checkpoints"

    def notes(self, rank: int = 0) -> list[Any]:
        """Read the journal of a process, but for a line that it was killed in."""
        path = self.folder / f"journal-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def is_unfinished(self) -> int:
        """Count the files that a killed process left."""
        return len(list((self.folder / "run").rglob(f"*{MARK}*")))

    def state(self) -> dict[str, Any]:
        """Read its newest checkpoint."""
        state: dict[str, Any] = torch.load(self.checkpoints / "last.ckpt", weights_only=True)
        return state

    def metrics(self) -> list[dict[str, str]]:
        """Read what it logged, without times."""
        with (self.folder / "run" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows]

    def samples(self) -> dict[tuple[int, int], set[str]]:
        """Collect the keys that each process read for each step: one set of them, however often it began."""
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for rank in range(2):
            for note in self.notes(rank):
                if isinstance(note, list):
                    found[note[0], rank].add(" ".join(note[1]))
        return found


def wait_for(happens: Callable[[], bool], process: Processes, seconds: float = 120.0) -> bool:
    """Wait until something happens, the process ends, or the time is over; return whether it happened."""
    end = time.monotonic() + seconds
    while process.is_running and time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.002)
    return False


def in_training(run: Run, process: Processes, chance: random.Random) -> None:
    """Wait for some moment after the first new step."""
    before = len(run.notes())
    if wait_for(lambda: len(run.notes()) > before, process):
        time.sleep(chance.uniform(0, 3))


def in_validation(run: Run, process: Processes, chance: random.Random) -> None:
    """Wait for some moment of a validation."""
    begun = run.notes().count("validation")
    if wait_for(lambda: run.notes().count("validation") > begun, process):
        time.sleep(chance.uniform(0, 0.3))


def in_start(run: Run, process: Processes, chance: random.Random) -> None:
    """Wait for some moment before training."""
    time.sleep(chance.uniform(0, 3))


def in_writing(run: Run, process: Processes, chance: random.Random) -> None:
    """Wait until a checkpoint is being written."""
    wait_for(lambda: any(run.checkpoints.glob(f"*{MARK}*")), process)


FIRST, SECOND, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)
KINDS: dict[str, tuple[Callable[[Run, Processes, random.Random], None], signal.Signals, slice]] = {
    "SIGKILL, first process": (in_training, signal.SIGKILL, FIRST),
    "SIGKILL, second process": (in_training, signal.SIGKILL, SECOND),
    "SIGKILL, both": (in_training, signal.SIGKILL, BOTH),
    "SIGKILL, first process, in validation": (in_validation, signal.SIGKILL, FIRST),
    "SIGKILL, both, in validation": (in_validation, signal.SIGKILL, BOTH),
    "SIGKILL, both, while a checkpoint is written": (in_writing, signal.SIGKILL, BOTH),
    "SIGKILL, both, before training": (in_start, signal.SIGKILL, BOTH),
    "SIGTERM, first process": (in_training, signal.SIGTERM, FIRST),
    "SIGUSR1, second process": (in_training, signal.SIGUSR1, SECOND),
}
"""When, what, and whom."""


def kill(run: Run, kind: str, chance: random.Random) -> str:
    """Start the run, end it in one of the ways, and describe it in a row of a table."""
    moment, number, which = KINDS[kind]
    process = run.command.start(2)
    moment(run, process, chance)
    was_running = process.is_running
    process.send(number, which)
    codes = process.wait(60)
    steps = max([note[0] for note in run.notes() if isinstance(note, list)], default=0)
    what = kind if was_running else f"(ended before) {kind}"
    return f"| {what} | step {steps} | {codes[0]}, {codes[1]} | {run.is_unfinished()} |"


def sequence(count: int, chance: random.Random, kinds: Collection[str] = KINDS) -> Iterator[str]:
    """Draw kinds, each about as often, in any order."""
    drawn = [*kinds] * -(-count // len(kinds))
    chance.shuffle(drawn)
    yield from drawn[:count]


def differences(one: Any, two: Any, path: str) -> Iterator[str]:
    """Name what is not equal."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one.nan_to_num(7), two.nan_to_num(7)):
            yield path
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from differences(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list | tuple) and len(one) == len(two):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif one != two:
        yield path


def compare(ours: Run, theirs: Run) -> list[str]:
    """Name what is not as it should be."""
    one, two = ours.state(), theirs.state()
    wrong = [name for part in PARTS for name in differences(one.get(part), two.get(part), part)]
    rows = [[json.dumps(row) for row in run.metrics()] for run in (ours, theirs)]
    wrong += [f"metrics.csv lacks {row}" for row in rows[1] if rows[0].count(row) < rows[1].count(row)]
    wrong += [f"metrics.csv has also {row}" for row in rows[0] if rows[0].count(row) > rows[1].count(row)]
    wrong += ["the order of metrics.csv"] * (not wrong and rows[0] != rows[1])
    expected = theirs.samples()
    wrong += [
        f"samples of step {step} on rank {rank}"
        for (step, rank), keys in ours.samples().items()
        if keys != expected[step, rank]
    ]
    images = [{p.name: p.read_bytes() for p in (run.folder / "run").rglob("*.png")} for run in (ours, theirs)]
    wrong += differences(images[0], images[1], "images")
    return wrong + [f"left: {ours.is_unfinished()} files"] * (ours.is_unfinished() > 0)
