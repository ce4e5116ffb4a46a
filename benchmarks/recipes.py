"""Recipes of the demo's text-to-image task beside each other, core seconds charged to every stage.

``python -m benchmarks.recipes``: each recipe trains its own autoencoder, its CLIP if it has one, encodes the
training images with the one, trains the denoiser on one core, and draws unseen captions. A stage that
several recipes share is trained once and charged to each. Packing and drawing are common and not charged.
Repeated, it goes on where it stopped; seconds of a command that was killed are lost.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo import measure
from benchmarks.demo.report import Times
from benchmarks.demo.steps import ROOT, Plan, pack_shapes
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

HERE = Path("runs/recipes")
FIELDS = ("count", "colour", "size", "position", "shape", "all")
STAGES = ("autoencoder", "clip", "encode", "diffusion")
DIFFUSION = "demo/fast/diffusion"
ENCODING = ("--precision=bf16", "--num-workers=0")


@dataclass(frozen=True)
class Training:
    """A run of ldm.fit.

    Args:
        name: Its folder.
        config: Its configuration.
        options: Changes of it, as on the command line.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()


def steps(count: int) -> tuple[str, ...]:
    """Train so many steps, and validate at the end alone."""
    return f"--trainer.max_steps={count}", f"--trainer.val_check_interval={count}"


@dataclass(frozen=True)
class Recipe:
    """What is trained, one after the other.

    Args:
        autoencoder: Its autoencoder.
        clip: Its CLIP; None trains a text tower with the denoiser.
        options: Changes of demo/fast/diffusion.
    """

    autoencoder: Training
    clip: Training | None
    options: tuple[str, ...] = ()


MODEL = "--model.init_args"
AUTOENCODER = Training("autoencoder", "demo/fast/autoencoder")
CLIP = Training("clip", "demo/fast/clip")
EVERYWHERE = (f"{MODEL}.denoiser.init_args.attention=[true,true]",)
VELOCITY = (
    f"{MODEL}.objective={{schedule: Cosine, prediction: Velocity, timesteps: UniformTimesteps}}",
    f"{MODEL}.sampler={{class_path: DDIM, init_args: {{num_steps: 25}}}}",
)
COSINE = (f"{MODEL}.optimizer.init_args.decay=cosine", f"{MODEL}.optimizer.init_args.lr=0.01")


def times(mean: float, std: float = 1.0) -> tuple[str, ...]:
    """Train with flow matching at timesteps whose logit is normal."""
    distribution = f"{{class_path: LogitNormal, init_args: {{mean: {mean}, std: {std}}}}}"
    return (f"{MODEL}.objective={{schedule: RectifiedFlow, prediction: Flow, timesteps: {distribution}}}",)


TOWER = "{width: 96, layers: 2, heads: 4, context_length: 20}"
NEW_TEXT = (f"{MODEL}.conditioner={{class_path: NewText, init_args: {TOWER}}}",)
RECIPES = {
    "demo": Recipe(
        Training("demo-autoencoder", "demo/autoencoder", steps(2000)),
        Training("demo-clip", "demo/clip", steps(560)),
        (
            *EVERYWHERE,
            *VELOCITY,
            *COSINE,
            *steps(1700),
            f"{MODEL}.optimizer.init_args.warmup=200",
            "--ema.decay=0.995",
        ),
    ),
    "fast": Recipe(AUTOENCODER, CLIP),
    "half": Recipe(AUTOENCODER, CLIP, steps(1400)),  # of the demo's core seconds
    # about 190 core seconds of diffusion each
    "short-new-text": Recipe(AUTOENCODER, None, (*EVERYWHERE, *VELOCITY, *COSINE, *NEW_TEXT, *steps(380))),
    "short-demo": Recipe(AUTOENCODER, CLIP, (*EVERYWHERE, *VELOCITY, *COSINE, *steps(400))),
    "short-coarse-attention": Recipe(AUTOENCODER, CLIP, (*VELOCITY, *COSINE, *steps(520))),
    "short-flow": Recipe(AUTOENCODER, CLIP, (*times(0.0), *COSINE, *steps(520))),
    "short-linear": Recipe(AUTOENCODER, CLIP, (*times(0.0), *steps(520))),
    "short-less-noise": Recipe(AUTOENCODER, CLIP, (*times(-0.5), *steps(520))),
    "short-fast": Recipe(AUTOENCODER, CLIP, steps(520)),
}
"""By name; what differs from demo/fast/diffusion is a line of YAML each."""


class Workshop:
    """Trains and charges, in one folder.

    Args:
        seed: Seed of every stage.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.folder = seed, HERE / f"seed-{seed}"
        self.times = Times(self.folder / "seconds.json")

    def train(self, training: Training) -> Path:
        """Train unless that is done; return the run folder."""
        run = self.folder / training.name
        command = ["ldm.fit", f"--config={training.config}", f"--run={run}", f"--seed_everything={self.seed}"]
        seconds, output = charged([*command, "--wandb.mode=disabled", *training.options])
        if ": finished, " not in output:
            self.times.add(training.name, seconds)
        return run

    def encode(self, autoencoder: Path) -> Path:
        """Encode the training images unless that is done; return the folder of latents."""
        name = f"{autoencoder.name}-latents"
        out, shards = self.folder / name, f"--shards={Plan().pattern('train')}"
        seconds, _ = charged(
            ["ldm.encode", f"--autoencoder={autoencoder}", shards, f"--out={out}", *ENCODING]
        )
        self.times.set(name, max(seconds, self.times.seconds.get(name, 0.0)))  # of the call that did the work
        return out

    def make(self, name: str, recipe: Recipe) -> tuple[Path, dict[str, float]]:
        """Train all stages of a recipe; return the run of diffusion, and the core seconds of each stage."""
        autoencoder, seconds = self.train(recipe.autoencoder), self.times.seconds
        latents = self.encode(autoencoder)
        text: tuple[str, ...] = ()
        if recipe.clip is not None:
            text = (f"{MODEL}.conditioner.init_args.checkpoint={self.train(recipe.clip)}",)
        upstream = (
            f"{MODEL}.latents.init_args.checkpoint={autoencoder}",
            f"--data.train={latents}/train-*.tar",
        )
        run = self.train(Training(name, DIFFUSION, (*upstream, *text, *recipe.options)))
        clip = 0.0 if recipe.clip is None else seconds[recipe.clip.name]
        costs = (seconds[autoencoder.name], clip, seconds[latents.name], seconds[name])
        return run, dict(zip(STAGES, costs, strict=True))


def charged(command: list[str]) -> tuple[float, str]:
    """Run a command of ldm on one core; return its seconds of processor time, and what it printed.

    Raises:
        RuntimeError: If it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before, printed = resource.getrusage(resource.RUSAGE_CHILDREN), []
    with subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            printed.append(line)
    if process.returncode != 0:
        raise RuntimeError(f"'{' '.join(command)}' failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "".join(printed)


def right(run: Path, num: int) -> dict[str, float]:
    """Draw unseen captions, and read them back: shares in [0, 1]."""
    plan = Plan()
    novel = measure.load(plan.pattern("novel"), num, plan.packing.size)
    return measure.read_back(measure.drawn(load_stage(run, Diffusion), novel["text"]), novel["text"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="recipes (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of all stages (default: 0)")
    parser.add_argument("--num", type=int, default=500, help="unseen captions (default: 500)")
    options = parser.parse_args(arguments)
    pack_shapes(Plan())
    rows = [f"| recipe | seed | {' | '.join(STAGES)} | core seconds | {' | '.join(FIELDS)} |"]
    rows.append("|---" * (len(STAGES) + len(FIELDS) + 3) + "|")
    for seed in options.seeds:
        for name in options.only:
            run, seconds = Workshop(seed).make(name, RECIPES[name])
            shares = right(run, options.num)
            figures = [f"{seconds[stage]:.0f}" for stage in STAGES] + [f"{sum(seconds.values()):.0f}"]
            figures += [f"{shares[field]:.3f}" for field in FIELDS]
            rows.append(f"| {name} | {seed} | {' | '.join(figures)} |")
            print(rows[-1], flush=True)
    print("\n" + "\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
