"""Why latent diffusion: ``python -m benchmarks.pixels``, after ``make demo`` and configs/demo/pixels.yaml.

Draws the same unseen captions with the model in latents and with the one in pixels, and reads the images
back. The compute of each run stands beside: core seconds of training, the autoencoder's charged to latents.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from benchmarks.demo import measure
from ldm.io.images import grid, write_png
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

FIELDS = ("count", "colour", "size", "position", "shape", "all")


def training_seconds(run: Path) -> float:
    """Return the seconds that a run's training steps took, from its metrics.csv, validation left out."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/step_seconds")]
    steps = int(rows[-1]["step"]) + 1
    return steps * sum(float(row["train/step_seconds"]) for row in rows) / len(rows)


def main() -> None:
    """Print one table and write one image: a row of each model's drawings in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="Folder of the demo's runs.")
    parser.add_argument("--novel", default="shards/shapes/novel-*.tar", help="Shards of unseen captions.")
    parser.add_argument("--num", type=int, default=200, help="Captions to draw.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo/pixels.png"), help="The image.")
    options = parser.parse_args()
    texts = measure.load(options.novel, options.num, 32)["text"]
    seconds = {name: training_seconds(options.runs / name) for name in ("autoencoder", "diffusion", "pixels")}
    # the autoencoder has one of the two cores, the diffusion stages have both
    cost = {"diffusion": seconds["autoencoder"] + 2 * seconds["diffusion"], "pixels": 2 * seconds["pixels"]}
    rows = []
    print(f"| model | core seconds of training | {' | '.join(FIELDS)} |\n|---|---|{'---|' * len(FIELDS)}")
    for name, title in (("diffusion", "latents"), ("pixels", "pixels")):
        stage = load_stage(str(options.runs / name), Diffusion)
        images = measure.drawn(stage, texts)
        scores = measure.read_back(images, texts)
        figures = " | ".join(f"{scores[field]:.3f}" for field in FIELDS)
        print(f"| {title} | {cost[name]:.0f} | {figures} |", flush=True)
        rows.append(images[:12])
    write_png(options.out, grid(torch.cat(rows), columns=12), {"captions": "\n".join(texts[:12])})
    print(f"images: {options.out}: above in latents, below in pixels, captions the same")


if __name__ == "__main__":
    main()
