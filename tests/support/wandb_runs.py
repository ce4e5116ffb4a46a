"""Tiny runs of ldm.fit that log to the stand-in for W&B's server, each in a process of its own."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tiny_runs import ROOT, SUPPORT, Chain

STEPS = 12
PACED = ["--trainer.callbacks+=pausing.Paused"]


@dataclass(frozen=True)
class Tiny:
    """An autoencoder of twelve steps, validated every fourth.

    Args:
        shards: Packed shapes.
        run: Folder of the run.
        server: Variables of the environment that lead to the server.
        paces: Folder whose file "until" has the step that it waits before; None does not wait.
    """

    shards: Path
    run: Path
    server: dict[str, str]
    paces: Path | None = None

    def arguments(self, *more):
        chain = Chain(self.run.parent, self.shards, self.run)
        short = [f"--run={self.run}", f"--trainer.max_steps={STEPS}", "--data.batch_size=2"]
        pauses = [] if self.paces is None else [*PACED, f"--trainer.callbacks.folder={self.paces}"]
        return chain.arguments("autoencoder", "--wandb.mode=online", *short, *pauses, *more)

    def environment(self, **more):
        home = {"HOME": str(self.run.parent), "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
        return {**os.environ, **self.server, **home, "OMP_NUM_THREADS": "1", **more}

    @contextmanager
    def started(self, *more, **variables):
        """Start it in a process group of its own; what is left of it is killed after the ``with`` block."""
        command = [sys.executable, "-m", "ldm.fit", *self.arguments(*more)]
        files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(
            command, env=self.environment(**variables), cwd=self.run.parent, start_new_session=True, **files
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def train(self, *more, code=0, seconds=200, **variables):
        """Train to the end; returns what it printed, and how long it took."""
        begin = time.monotonic()
        with self.started(*more, **variables) as process:
            out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
        return out, err, time.monotonic() - begin

    def command(self, module, *arguments, code=0):
        call = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(
            call, env=self.environment(), cwd=self.run.parent, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def go_on_until(self, step):
        """Let it train until a step, before which it waits for a signal or a further call of this."""
        (self.paces / "until").write_text(str(step))

    def wait_for_steps(self, process, count):
        while sum(bool(row["train/loss"]) for row in self.rows) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    @property
    def rows(self):
        path = self.run / "metrics.csv"
        return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []

    @property
    def id(self):
        return (self.run / "wandb-id.txt").read_text().split("\n")[0]


def clients(environment):
    """Processes of W&B's client whose server is that of an environment."""
    wanted = f"WANDB_BASE_URL={environment['WANDB_BASE_URL']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            if name == "wandb-core" and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def end_clients(environment):
    """Kill those that a killed run left."""
    for number in clients(environment):
        os.kill(number, signal.SIGKILL)
