"""The steps of the demo: pack, train, encode. Each is a command of the project, and can be repeated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO

from data.shapes.packer import Settings, pack
from ldm import encode
from ldm.data.manifest import read_latents
from ldm.io.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """Folders of the demo, as in its configurations, and amounts of work.

    Args:
        shards: Folder of the packed shapes.
        latents: Folder of the encoded ones.
        runs: Folder of the runs.
        packing: Numbers of images.
        changes: Options of ldm.fit in addition to the configuration.
        num_novel: Unseen captions that are drawn.
        num_pairs: Captions with unseen pairs of colour and shape that are drawn.
        num_scenes: Scenes among which CLIP finds the right one.
        cores: Cores that it may use.
    """

    shards: Path = Path("shards/shapes")
    latents: Path = Path("shards/shapes-latents")
    runs: Path = Path("runs/demo")
    packing: Settings = field(default_factory=Settings)
    changes: tuple[str, ...] = ()
    num_novel: int = 500
    num_pairs: int = 200
    num_scenes: int = 512
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)

    def run(self, stage: str) -> Path:
        """Folder of a stage's run."""
        return self.runs / stage

    def pattern(self, split: str) -> str:
        """Glob of a split's shards."""
        return str(self.shards / f"{split}-*.tar")

    def command(self, stage: str) -> list[str]:
        """Command line that trains a stage."""
        config = str(ROOT / "configs" / "demo" / f"{stage}.yaml")
        return [sys.executable, "-u", "-m", "ldm.fit", "--config", config, *self.changes]


def tiny() -> Plan:
    """Plan the complete chain in miniature: it shows that everything works, and draws nothing."""
    changes = {
        "data.batch_size": 8,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "sample_grid.num": 2,
        "wandb.mode": "disabled",
    }
    # as many shards as the configurations name
    packing = Settings(train=80, val=4, novel=8, pairs=8, shard_size=4)
    options = tuple(f"--{key}={value}" for key, value in changes.items())
    return Plan(packing=packing, changes=options, num_novel=8, num_pairs=8, num_scenes=8, cores=1)


def pack_shapes(plan: Plan) -> None:
    """Make the shards, unless they are there."""
    pack(plan.shards, plan.packing, workers=plan.cores)


def encode_latents(plan: Plan) -> None:
    """Encode the training shards, unless this autoencoder has done so.

    Latents of an earlier autoencoder are deleted: they are the demo's own, and of no more use.

    Raises:
        RuntimeError: If encoding fails.
    """
    autoencoder, manifest = str(plan.run("autoencoder")), read_latents(plan.latents)
    if manifest is not None and manifest["autoencoder"]["sha256"] != Checkpoint.open(autoencoder).sha256:
        shutil.rmtree(plan.latents)
    shards = ["--shards", plan.pattern("train"), "--out", str(plan.latents)]
    if encode.main(["--autoencoder", autoencoder, *shards]) != 0:
        raise RuntimeError(f"encoding {plan.pattern('train')} failed")


def train(plan: Plan, *stages: str) -> dict[str, float]:
    """Train stages at the same time, each with its share of the cores.

    What they say is shown with the stage's name before it, and kept in log.txt of the run.

    Returns:
        Seconds that each took; a stage whose run was finished before is left out.

    Raises:
        RuntimeError: If one fails.
    """
    threads = max(1, plan.cores // len(stages))
    trainings = [Training(stage, plan, threads) for stage in stages]
    try:
        results = {training.stage: training.wait() for training in trainings}
    finally:
        for training in trainings:
            training.stop()
    return {stage: seconds for stage, seconds in results.items() if seconds is not None}


class Training:
    """A process of ldm.fit whose output is shown line by line.

    Args:
        stage: What it trains.
        plan: Where.
        threads: Cores that it may use.
    """

    def __init__(self, stage: str, plan: Plan, threads: int) -> None:
        self.stage = stage
        self._run = plan.run(stage)
        self._run.mkdir(parents=True, exist_ok=True)
        self._was_finished = False
        self._begun = time.monotonic()
        self._process = subprocess.Popen(
            plan.command(stage),
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        self._reader = Thread(target=self._show, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def wait(self) -> float | None:
        """Wait for the end; return the seconds it took, or None if there was nothing left to train."""
        code = self._process.wait()
        self._reader.join()
        if code != 0:
            raise RuntimeError(f"training {self.stage} failed: see {self._run / 'log.txt'}")
        return None if self._was_finished else time.monotonic() - self._begun

    def stop(self) -> None:
        """End the process if it is still there."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _show(self, output: IO[str]) -> None:
        with (self._run / "log.txt").open("a", encoding="utf-8") as log:
            for line in output:
                log.write(line)
                log.flush()
                self._was_finished |= ": finished, " in line
                print(f"[{self.stage}] {line}", end="", flush=True)


def _python_path() -> str:
    """Let processes find ldm and data when they run elsewhere, as --tiny does."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
