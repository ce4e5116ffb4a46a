"""Command lines to compare, their prerequisites, and a checkout that runs them in its own folder."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

# Twenty training shards, as configurations name; more validation samples than features of the demo's CLIP.
_SHAPES = "-m data.shapes --train 2560 --val 128 --novel 0 --pairs 0 --shard-size 128 --workers 1"
_ENCODE = "-m ldm.encode --autoencoder runs/demo/autoencoder --device cpu"
_FIT = (
    "-m ldm.fit --config {config} --run runs/{name} --wandb.mode disabled --trainer.precision 32-true "
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.log_every_n_steps 1 "
    "--trainer.max_steps {steps} --trainer.val_check_interval {half}"
)
COMMANDS = {
    "shards/shapes": f"{_SHAPES} --out shards/shapes",
    "shards/conditions": f"{_SHAPES} --out shards/conditions --conditions",
    "shards/digits": "-m data.digits --out shards/digits",
    "shards/shapes-latents": f"{_ENCODE} --shards shards/shapes/train-*.tar --out shards/shapes-latents",
    "shards/conditions-latents": f"{_ENCODE} --shards shards/conditions/train-*.tar "
    "--out shards/conditions-latents --keep-images",
    "demo/autoencoder": _FIT,
    "demo/clip": _FIT,
    "diffusion": f"{_FIT} --model.sampler.num_steps 5",
    "samples": "-m ldm.sample --checkpoint runs/demo/diffusion --prompts captions.txt --steps 5 "
    "--device cpu --out samples",
    "evaluation": "-m ldm.evaluate --checkpoint runs/demo/diffusion --data shards/shapes/val-000000.tar "
    "--clip runs/demo/clip --num-images 128 --guidance 1 3 --steps 5 --device cpu --out evaluation",
}
"""Arguments of Python in BEFORE; any other configuration trains as "diffusion" does."""
AFTER_COMMANDS: dict[str, str] = {}
"""Those that are written otherwise in AFTER."""
RENAMED_CONFIGS: dict[str, str] = {}
"""Configurations by their name in BEFORE, their name in AFTER."""
NEEDS = {
    "demo/autoencoder": ("shards/shapes",),
    "demo/clip": ("shards/shapes",),
    "demo/digits": ("shards/digits",),
    "demo/pixels": ("demo/clip",),
    "shards/shapes-latents": ("demo/autoencoder",),
    "demo/diffusion": ("shards/shapes-latents", "demo/clip"),
    "shards/conditions-latents": ("shards/conditions", "demo/autoencoder"),
    "conditions": ("shards/conditions-latents", "demo/clip"),
    "samples": ("demo/diffusion",),
    "evaluation": ("demo/diffusion",),
}
"""Prerequisites of each; "conditions" stands for each of its configurations."""
CAPTIONS = (
    "a large red ring in the center on a white background",
    "a small blue square left of a large green circle on a black background",
    "a small yellow cross above a small pink diamond",
    "a large cyan triangle in the top left on a grey background",
)


class Side:
    """One of the two checkouts, and the folder in which its commands run.

    Args:
        checkout: Folder of the checkout.
        folder: Where its commands run.
        commands: By the name of a step.
        configs: Names of its configurations, by those in BEFORE.
    """

    def __init__(
        self, checkout: Path, folder: Path, commands: Mapping[str, str], configs: Mapping[str, str]
    ) -> None:
        self.checkout, self.folder = checkout.resolve(), folder.resolve()
        self.commands, self.configs = commands, configs
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")

    @functools.cached_property
    def state(self) -> str:
        """SHA-256 of the code and the configurations, committed or not, and of what they run on."""
        digest = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
        for path in sorted(p for top in ("ldm", "data", "configs") for p in (self.checkout / top).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(str(path.relative_to(self.checkout)).encode() + path.read_bytes())
        return digest.hexdigest()

    def arguments(self, step: str, steps: int) -> list[str]:
        """Return the command line of a step."""
        config = self.checkout / "configs" / f"{self.configs.get(step, step)}.yaml"
        command = self.commands.get(step, self.commands["diffusion"])
        return command.format(config=config, name=step, steps=steps, half=steps // 2).split()

    def run(self, step: str, steps: int, reuse: bool) -> None:
        """Run a step in a process of its own, unless ``reuse`` and this code has done it here before."""
        mark = self.folder / "complete" / step.replace("/", "-")
        arguments = self.arguments(step, steps)
        key = f"{self.state} {' '.join(arguments)}"
        if reuse and mark.exists() and mark.read_text() == key:
            return
        mark.unlink(missing_ok=True)
        shutil.rmtree(self.folder / output(step), ignore_errors=True)
        self.python(arguments, self.folder / "logs" / f"{mark.name}.txt")
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(key)

    def python(self, arguments: Sequence[str], log: Path) -> None:
        """Run Python on this checkout and one thread; what it prints goes into ``log``."""
        log.parent.mkdir(exist_ok=True)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env = {**os.environ, **threads, "PYTHONPATH": str(self.checkout), "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as file:
            command = [sys.executable, *arguments]
            done = subprocess.run(command, cwd=self.folder, env=env, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            last = "\n".join(log.read_text().splitlines()[-5:])
            raise SystemExit(f"{self.checkout}: python {' '.join(arguments)} failed, see {log}:\n{last}")

    def check(self) -> None:
        """Refuse to measure a package that is installed elsewhere."""
        code = f"import ldm; assert ldm.__file__.startswith({str(self.checkout) + os.sep!r}), ldm.__file__"
        self.python(["-c", code], self.folder / "logs" / "check.txt")


def output(step: str) -> str:
    """Name the folder that a step writes, within that of its side."""
    return step if step.partition("/")[0] in ("shards", "samples", "evaluation") else f"runs/{step}"


def plan(checkout: Path, only: Sequence[str]) -> list[str]:
    """List the steps in order, each after what it needs.

    Args:
        checkout: BEFORE.
        only: Names of configurations and steps, with or without their folder; empty: all.

    Raises:
        ValueError: If one of ``only`` is unknown.
    """
    configs = [
        f"{folder}/{path.stem}"
        for folder in ("demo", "conditions")
        for path in sorted((checkout / "configs" / folder).glob("[!_]*.yaml"))
    ]
    steps = list(dict.fromkeys([*(n for n in COMMANDS if n != "diffusion"), *configs]))
    for name in only:
        if not any(name in (step, step.partition("/")[2]) for step in steps):
            raise ValueError(f"--only: got {name}, expected some of {', '.join(steps)}")
    wanted = [s for s in steps if not only or s in only or s.partition("/")[2] in only]
    return list(dict.fromkeys(step for name in wanted for step in _with_needs(name)))


def _with_needs(step: str) -> Iterator[str]:
    for needed in NEEDS.get(step, NEEDS["conditions"] if step.startswith("conditions/") else ()):
        yield from _with_needs(needed)
    yield step
