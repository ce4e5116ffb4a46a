"""How well do drawn digits read? ``python -m benchmarks.digits --checkpoint runs/demo/digits``.

A support vector machine trained on the real training digits reads images that the class-conditional model
drew without guidance, and the real validation digits, which are its own ceiling.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tqdm import tqdm

from ldm.diffusion.guidance import Unguided
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage


def train_reader() -> tuple[SVC, float]:
    """Train the reader on 1,500 real digits; return it with its accuracy on the other 297."""
    digits = load_digits()
    train, test, train_label, test_label = train_test_split(
        digits.data, digits.target, test_size=297, stratify=digits.target, random_state=0
    )
    reader = SVC(gamma=1e-3).fit(train, train_label)
    return reader, float(reader.score(test, test_label))


def draw(stage: Diffusion, labels: torch.Tensor, seed: int) -> np.ndarray:
    """Draw one digit per label, without guidance: (N, 64), ink from 0 to 16 as in scikit-learn."""
    stage.guidance = Unguided()
    images = []
    for part in tqdm(torch.arange(len(labels)).split(100), desc="draw", unit=" x 100"):
        keys = [f"digit-{i}" for i in part.tolist()]
        images.append(stage.generate({"key": keys, "label": labels[part]}, seed))
    return ((torch.cat(images).mean(1) + 1.0) * 8.0).flatten(1).round().numpy()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="runs/demo/digits", help="Run folder or checkpoint.")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="*",
        help="Steps of the sampler, a row of the table for each; default: the run's.",
    )
    parser.add_argument("--num", type=int, default=1000, help="Digits to draw.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the images.")
    options = parser.parse_args()
    reader, ceiling = train_reader()
    labels = torch.arange(options.num) % 10
    stage = load_stage(options.checkpoint, Diffusion)
    print("| digits read right by a support vector machine | accuracy |\n|---|---|")
    print(f"| real, held out (297) | {ceiling:.3f} |")
    for steps in options.steps or [stage.sampler.num_steps]:
        stage.sampler.num_steps = steps
        drawn = draw(stage, labels, options.seed)
        right = float((reader.predict(drawn) == labels.numpy()).mean())
        print(f"| drawn in {steps} steps, no guidance ({options.num}) | {right:.3f} |")


if __name__ == "__main__":
    main()
