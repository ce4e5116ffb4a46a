"""The commands on synthetic images, one after the other, as a user calls them, and their speed."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ldm.data.writer import tar_writer

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Figures, Setting

WORDS = ("a", "red", "green", "blue", "small", "large", "photo", "of", "cat", "dog", "house", "tree", "and")
CONFIGS = {
    "sd1": {"autoencoder": "autoencoder/kl-f8", "clip": "clip/vit-b-32", "diffusion": "diffusion/sd1"},
    "tiny": {"autoencoder": "demo/autoencoder", "clip": "demo/clip", "diffusion": "demo/diffusion"},
}
STEPS = {"autoencoder": 60, "clip": 40, "diffusion": 80}
SPEED = "images_per_second", "step_seconds", "data_wait", "mfu", "memory_gib", "time_forward"
"""Columns of metrics.csv that are reported, without ``train/``."""


def shards(setting: Setting) -> Figures:
    """Write smooth images with captions as JPEGs: 20 shards of 200 of 384 pixels, on a CPU 2 of 8 of 48."""
    count, num, side = (20, 200, 384) if setting.size == "sd1" else (2, 8, 48)
    folder = setting.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"train-{i:06d}.tar", i, num, side) for i in range(count)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_shard, [*jobs, (folder / "val-000000.tar", count, num, side)]))
    return {"images": count * num, "pixels": side}


def _shard(job: tuple[Path, int, int, int]) -> None:
    path, seed, num, side = job
    rng = np.random.default_rng(seed)
    with tar_writer(path) as writer:
        for i in range(num):
            small = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
            smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.int16)
            noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(noisy).save(file, "JPEG", quality=90)
            text = " ".join(rng.choice(WORDS, 9))
            writer.write({"__key__": f"{seed:05d}{i:05d}", "jpg": file.getvalue(), "txt": text.encode()})


def fit(stage: str, setting: Setting) -> Figures:
    """Train a stage for some steps; of the last that were logged, its speed."""
    work, is_small = setting.work, setting.size == "tiny"
    steps = 4 if is_small else STEPS[stage]
    shards = "latents" if stage == "diffusion" else "shards"
    options = [
        f"--config={CONFIGS[setting.size][stage]}",
        f"--run={work / stage}",
        f"--data.train={work / shards}/train-*.tar",
        f"--data.val={work}/shards/val-000000.tar",
        f"--trainer.accelerator={'gpu' if setting.device.type == 'cuda' else 'cpu'}",
        "--trainer.devices=1",
        "--wandb.mode=disabled",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={steps}",
        f"--trainer.log_every_n_steps={steps // 4}",
        "--trainer.limit_val_batches=2",
        "--sample_grid.num=1",
    ]
    if stage == "diffusion":
        options += [
            f"--model.latents.checkpoint={work / 'autoencoder'}",
            f"--model.conditioner.checkpoint={work / 'clip'}",
            "--model.sampler.num_steps=2",
        ]
    if stage == "autoencoder":
        options += ["--model.init_args.losses=[]"]  # without LPIPS, whose weights are a download
    if is_small:
        options += ["--trainer.callbacks=[Throughput]"]  # the demo's evaluation needs its own images
        options += ["--data.batch_size=4", "--data.num_workers=0"]
    seconds = _call("ldm.fit", options)
    with (work / stage / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/step_seconds")]
    values = {name: rows[-1].get(f"train/{name}") for name in SPEED}
    return {"command_seconds": seconds, **{name: float(value) for name, value in values.items() if value}}


def encode(setting: Setting) -> Figures:
    """Encode the training images."""
    count = len(list((setting.work / "shards").glob("train-*.tar"))) * (200 if setting.size == "sd1" else 8)
    options = [f"--autoencoder={setting.work / 'autoencoder'}", f"--out={setting.work / 'latents'}"]
    shards = f"--shards={setting.work}/shards/train-*.tar"
    seconds = _call("ldm.encode", [*options, shards, f"--device={setting.device}"])
    return {"command_seconds": seconds, "images_per_second_with_start": count / seconds}


def sample(setting: Setting) -> Figures:
    """Draw 16 images of one prompt with guidance in 50 steps, on a CPU 2 in 2."""
    num, steps = (16, 50) if setting.size == "sd1" else (2, 2)
    options = [f"--checkpoint={setting.work / 'diffusion'}", "--prompt=a red cat", f"--num-per-prompt={num}"]
    options += [f"--steps={steps}", f"--out={setting.work / 'drawn'}", f"--device={setting.device}"]
    return {"command_seconds": _call("ldm.sample", options), "images": num, "steps": steps}


def _call(module: str, options: list[str]) -> float:
    """Run a command; return its seconds, those of the start included."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {json.dumps(options)}: {done.stderr[-300:]}")
    return time.perf_counter() - begun
