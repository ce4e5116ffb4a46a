"""The commands of one process: packing, encoding, sampling, evaluation, conversion."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.kills.forks import Command, Main
from benchmarks.kills.training import differences
from data import folder as images
from data.shapes import packer
from ldm import convert, encode, evaluate, sample, training
from ldm.io.atomic import MARK

ROOT = Path(__file__).resolve().parents[2]
OUT = "out"
"""Folder that each command writes, in the folder that it runs in."""
IGNORED = (".lock", ".lock-holder.txt", ".index.npz", ".importing")
"""Ends of files that are no results."""
GROWING = ("latents.json", "shards.json", ".done.json")
"""Ends of files that list what is done."""


@dataclass(frozen=True)
class Task:
    """A command to be killed.

    Args:
        name: Its name.
        main: The command.
        arguments: Its command line, which writes to ``OUT``.
        keeps: Whether it keeps the files of earlier calls, under names that end with "-1", "-2" ...
    """

    name: str
    main: Main
    arguments: list[str]
    keeps: bool = False


def prepare(root: Path, shards: Path) -> list[Task]:
    """Train tiny stages, and list the commands that use them."""
    runs, latents = root / "runs", root / "latents"
    for name in ("autoencoder", "clip", "diffusion"):
        train = latents if name == "diffusion" else shards
        options = {
            "run": runs / name,
            "wandb.mode": "disabled",
            "data.batch_size": 8,
            "trainer.max_steps": 2,
            "data.train": train / "train-{000000..000002}.tar",
            "data.val": shards / "val-000000.tar",
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "sample_grid.num": 0,
        }
        if name == "diffusion":
            options |= {"model.denoiser.block_out_channels": "[32,64]", "model.sampler.num_steps": 2}
            options |= {"model.latents.checkpoint": runs / "autoencoder"}
            options |= {"model.conditioner.checkpoint": runs / "clip"}
            options |= {"trainer.callbacks": "[]"}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        config = str(ROOT / "configs" / "demo" / f"{name}.yaml")
        Command(training.main, ["--config", config, *arguments], root).finish()
        if name == "autoencoder":
            Command(encode.main, _encode(runs, shards, latents), root).finish()
    Command(convert.main, _export(runs, root / "exported"), root).finish()
    source = root / "images"
    source.mkdir()
    chance = np.random.default_rng(0)
    for number in range(400):
        pixels = chance.integers(0, 256, (64, 96, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number:04d}.png")
        (source / f"{number:04d}.txt").write_text("" if number == 7 else f"number {number}")
    return _tasks(root, runs, shards)


def _encode(runs: Path, shards: Path, out: Path | str) -> list[str]:
    return [
        f"--autoencoder={runs / 'autoencoder'}",
        f"--shards={shards}/train-*.tar",
        f"--out={out}",
        "--batch-size=2",
        "--device=cpu",
    ]


def _export(runs: Path, out: Path | str) -> list[str]:
    return ["to-diffusers", f"--run={runs / 'diffusion'}", f"--out={out}"]


_FOLDER = ["--shard-size=40", "--resize=32", "--masks"]


def _tasks(root: Path, runs: Path, shards: Path) -> list[Task]:
    draws = ["--device=cpu", "--steps=2", f"--checkpoint={runs / 'diffusion'}", "--batch-size=4"]
    measured = [f"--clip={runs / 'clip'}", f"--data={shards}/val-*.tar", "--save-images", "--cache=cache"]
    measured += ["--guidance", "1", "3"]
    folder, exported = [f"--images={root / 'images'}", *_FOLDER], [f"--folder={root / 'exported'}"]
    texts = root / "prompts.txt"
    texts.write_text("".join(f"a red circle number {n}\n" for n in range(40)))
    shapes = ["--train=300", "--val=40", "--novel=40", "--pairs=40", "--shard-size=40", "--workers=1"]
    return [
        Task("data.shapes", packer.main, [*shapes, f"--out={OUT}"]),
        Task("data.folder", images.main, [*folder, f"--out={OUT}"]),
        Task("ldm.encode", encode.main, _encode(runs, shards, OUT)),
        Task("ldm.sample", sample.main, [*draws, f"--prompts={texts}", f"--out={OUT}"]),
        Task("ldm.evaluate", evaluate.main, [*draws, *measured, f"--out={OUT}"], keeps=True),
        Task("ldm.convert to-diffusers", convert.main, _export(runs, OUT)),
        Task("ldm.convert from-diffusers", convert.main, ["from-diffusers", *exported, f"--out={OUT}"]),
    ]


@dataclass
class Victim:
    """A command that is killed again and again, in a folder of its own each time it came to its end.

    Args:
        task: The command.
        root: Folder for its folders.
        seconds: How long it takes undisturbed.
        rounds: How often it came to its end, after some kills.
    """

    task: Task
    root: Path
    seconds: float = 0.0
    rounds: int = 0

    def __post_init__(self) -> None:
        """Run it undisturbed, twice: the first pays for caches of the system."""
        for name in ("warm", "whole"):
            begun = time.monotonic()
            self._command(name).finish()
            self.seconds = time.monotonic() - begun

    def _command(self, name: str) -> Command:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return Command(self.task.main, self.task.arguments, folder)

    def kill(self, chance: random.Random) -> tuple[str, list[str]]:
        """Kill it at some moment; return a row of a table, and what is wrong with what it left.

        A call that ends before it is killed must have done all, and the next one begins anew.
        """
        while True:
            name = f"round-{self.rounds}"
            process = self._command(name).start()
            time.sleep(chance.uniform(0, self.seconds))
            was_running = process.is_running
            process.send(signal.SIGKILL, slice(0, 1))
            (code,) = process.wait(60)
            if was_running and code == -signal.SIGKILL:
                left = list((self.root / name).rglob(f"*{MARK}*"))
                wrong = self._partial(name)
                return (
                    f"| SIGKILL, {self.task.name} | {len(self._files(name))} files | {code} | {len(left)} |",
                    wrong,
                )
            if code:
                return f"| (failed) {self.task.name} | | {code} | |", [self._failure(name, code)]
            self.rounds += 1
            if wrong := self._complete(name):
                return f"| (done) {self.task.name} | | {code} | |", wrong

    def finish(self) -> list[str]:
        """Let it run to its end; name what is wrong then."""
        name = f"round-{self.rounds}"
        (code,) = self._command(name).start().wait(600)
        self.rounds += 1
        return [self._failure(name, code)] if code else self._complete(name)

    def _failure(self, name: str, code: int) -> str:
        last = (self.root / name / "log").read_text().splitlines()[-1:]
        return f"{self.task.name}: exit code {code} of the same command: {' '.join(last)}"

    def _files(self, name: str) -> dict[str, Path]:
        out = self.root / name / OUT
        paths = [path for path in out.rglob("*") if path.is_file() and MARK not in str(path.relative_to(out))]
        return {str(path.relative_to(out)): path for path in paths if not path.name.endswith(IGNORED)}

    def _is_earlier(self, file: str) -> bool:
        return self.task.keeps and re.search(r"-\d+\.\w+$", file) is not None

    def _partial(self, name: str) -> list[str]:
        """Name what a killed call left that could be taken for the whole: each file is as it will be."""
        whole = self._files("whole")
        wrong = []
        for file, path in self._files(name).items():
            if self._is_earlier(file):
                continue
            if not (is_growing(path) or (file in whole and same(path, whole[file]))):
                wrong.append(f"{self.task.name}: {file} of a killed call is not that of the whole one")
        return wrong

    def _complete(self, name: str) -> list[str]:
        ours, whole = self._files(name), self._files("whole")
        ours = {file: path for file, path in ours.items() if not self._is_earlier(file)}
        wrong = [f"{file} is missing" for file in whole.keys() - ours.keys()]
        wrong += [f"{file} is more" for file in ours.keys() - whole.keys()]
        wrong += [
            f"{file} differs" for file in ours.keys() & whole.keys() if not same(ours[file], whole[file])
        ]
        wrong += [f"left: {path.name}" for path in (self.root / name).rglob(f"*{MARK}*")]
        return [f"{self.task.name}: {what}" for what in wrong]


def is_growing(path: Path) -> bool:
    """Whether a file is JSON that says of itself that there is more to come."""
    if path.suffix != ".json":
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return False
    is_begun = path.name.endswith(GROWING) or found.get("is_complete") is False
    return isinstance(found, dict) and is_begun


def same(one: Path, two: Path) -> bool:
    """Whether two files hold the same: arrays and members of tars are compared, not times."""
    if one.read_bytes() == two.read_bytes():
        return True
    if one.suffix == ".npz":
        with np.load(one) as a, np.load(two) as b:
            return sorted(a) == sorted(b) and all(np.array_equal(a[name], b[name]) for name in a)
    if one.suffix == ".json":
        return _timeless(one) == _timeless(two)
    if one.suffix == ".ckpt":
        states = [torch.load(path, weights_only=True) for path in (one, two)]
        return not list(differences(states[0], states[1], ""))
    return False


def _timeless(path: Path) -> Any:
    """Read JSON without what depends on when and where it was written."""
    drop = ("mtime_ns", "date", "seconds", "time")
    return json.loads(path.read_text(), object_hook=lambda o: {k: v for k, v in o.items() if k not in drop})
