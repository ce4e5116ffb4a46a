"""What the perceptual and the adversarial loss are worth: ``python -m benchmarks.perceptual``.

Trains one small autoencoder on emoji twice, from the same start, by configs/emoji: with squared error alone,
and with the full loss of Rombach et al. 2021. Then measures what both make of emoji that no network has seen.

The full loss compares features of a CLIP (emoji/clip). Measured with that CLIP alone, the result would say
little. So distances are of a second network of another kind: a convolutional classifier of the subgroups
of emoji, trained here. Both are given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.data.module import Shards
from ldm.io.images import from_bytes, grid, to_bytes, write_png
from ldm.losses.features import unit_distance
from ldm.metrics.frechet import frechet_distance
from ldm.metrics.moments import GaussianMoments
from ldm.metrics.psnr import psnr
from ldm.metrics.ssim import SSIM
from ldm.nets.feature_maps import FeatureMaps
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import CLIPTower, load_stage
from ldm.types import Batch

ARMS = {"squared-error": "squared error", "perceptual": "full loss"}
RUNS = ("clip", "autoencoder", *ARMS)
"""Configurations of configs/emoji, in the order in which they are trained."""
COLUMNS = 12


class Judge(nn.Module):
    """Classifies images; what comes before its last layer describes them.

    Args:
        num_classes: Number of classes.
        widths: Channels of its convolutions, each of which halves the sides.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.ReLU())
            for before, width in zip((3, *widths[:-1]), widths, strict=True)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, F)."""
        found: Tensor = self.blocks(image).mean((2, 3))
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Map images to logits of the classes."""
        found: Tensor = self.head(self.image_features(image))
        return found


def load(pattern: str) -> Batch:
    """Load all samples of shards; "image" is (N, 3, 64, 64) uint8."""
    data = Shards(pattern, pattern, image_size=64, batch_size=64, fields=["image", "label", "text"])
    batches = list(tqdm(data.val_dataloader(), desc=f"read {pattern}"))
    found: Batch = {
        "key": [key for batch in batches for key in batch["key"]],
        "image": torch.cat([batch["image"] for batch in batches]),
        "label": torch.cat([batch["label"] for batch in batches]),
    }
    return found


def train_judge(path: Path, shards: str, steps: int, seed: int = 0) -> Judge:
    """Train the classifier with mirrored images, once; later calls read it from ``path``."""
    torch.manual_seed(seed)
    judge = Judge(num_classes=128)
    if path.is_file():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    train = load(f"{shards}/train-*.tar")
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in (bar := tqdm(range(steps), desc="judge")):
        rows = torch.randint(len(train["key"]), (64,))
        image = from_bytes(train["image"][rows])
        image = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, image, image.flip(3))
        loss = F.cross_entropy(judge(image), train["label"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=loss.item())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), path)
    return judge.eval()


@torch.no_grad()
def reconstruct(stage: Autoencoder, images: Tensor) -> Tensor:
    """Reconstruct images (N, 3, H, W) uint8 from the posterior mean; the same type."""
    parts = [stage.generate({"key": [], "image": from_bytes(part)}, seed=0) for part in images.split(64)]
    return torch.cat([to_bytes(part) for part in parts])


@torch.no_grad()
def features(network: Judge | CLIPTower, images: Tensor) -> Tensor:
    """Describe images (N, 3, H, W) uint8."""
    return torch.cat([network.image_features(from_bytes(part)) for part in images.split(64)])


def frechet(a: Tensor, b: Tensor) -> float:
    """Compute the Fréchet distance of two sets of features (N, F)."""
    moments = GaussianMoments(), GaussianMoments()
    for each, found in zip(moments, (a, b), strict=True):
        each.update(found)
    return frechet_distance(moments[0].gaussian, moments[1].gaussian)


def measure(judge: Judge, clip: CLIPTower, images: Tensor, real: Batch) -> Iterator[tuple[str, float]]:
    """Compare images (N, 3, H, W) uint8 with the real ones; yield a name and a value of each measure."""
    originals = real["image"]
    pairs = list(zip(images.split(64), originals.split(64), strict=True))
    yield "PSNR, dB", torch.cat([psnr(from_bytes(a), from_bytes(b)) for a, b in pairs]).mean().item()
    ssim = SSIM()
    for a, b in pairs:
        ssim.update(from_bytes(a), {"key": [], "image": from_bytes(b)})
    yield "SSIM", ssim.compute()["ssim"]
    maps = FeatureMaps(lambda: judge, [f"blocks.{i}" for i in range(len(judge.blocks))])
    with torch.no_grad():
        distances = [
            torch.stack(
                [unit_distance(x, y) for x, y in zip(maps(from_bytes(a)), maps(from_bytes(b)), strict=True)]
            )
            for a, b in pairs
        ]
    yield "distance of the judge's features", torch.cat(distances, 1).mean().item()
    yield "Fréchet distance, judge", frechet(features(judge, images), features(judge, originals))
    yield "Fréchet distance, CLIP of the loss", frechet(features(clip, images), features(clip, originals))
    with torch.no_grad():
        read = torch.cat([judge.head(found).argmax(1) for found in features(judge, images).split(64)])
    yield "subgroup read right", (read == real["label"]).float().mean().item()


def train(name: str, runs: Path, shards: str, more: list[str]) -> None:
    """Train a configuration of configs/emoji, unless its run is complete."""
    command = [sys.executable, "-m", "ldm.fit", "--config", f"emoji/{name}", f"--run={runs / name}"]
    command += [f"--data.{split}={shards}/{split}-*.tar" for split in ("train", "val")]
    if name in ARMS:
        command.append(f"--weights={runs / 'autoencoder'}")
    subprocess.run([*command, *more], check=True)


def write_sheet(path: Path, images: dict[str, Tensor]) -> None:
    """Write a row of images for each kind, twice as large."""
    rows = torch.cat(list(images.values())).repeat_interleave(2, 2).repeat_interleave(2, 3)
    write_png(path, grid(rows, columns=COLUMNS), {"rows": "; ".join(images)})


def main() -> None:
    """Train what is not trained yet; print one table, and write one image. Further options go to ldm.fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shards", default="shards/emoji", help="Folder of data.emoji.")
    add("--runs", type=Path, default=Path("runs/emoji"), help="Folder of the runs.")
    add("--judge-steps", type=int, default=600, help="Steps of the judge, of 64 images.")
    add("--out", type=Path, default=Path("runs/emoji/perceptual.png"), help="The image.")
    add("--no-train", action="store_true", help="Measure the runs as they are.")
    options, more = parser.parse_known_args()
    if options.no_train and more:
        parser.error(f"got {' '.join(more)}, expected no options of ldm.fit with --no-train")
    for name in () if options.no_train else RUNS:
        train(name, options.runs, options.shards, more)
    judge = train_judge(options.runs / "judge.pt", options.shards, options.judge_steps)
    real, clip = load(f"{options.shards}/val-*.tar"), CLIPTower(str(options.runs / "clip"))
    stages = {title: load_stage(str(options.runs / name), Autoencoder) for name, title in ARMS.items()}
    images = {title: reconstruct(stage, real["image"]) for title, stage in stages.items()}
    tables = {title: dict(measure(judge, clip, found, real)) for title, found in images.items()}
    tables |= {"originals": dict(measure(judge, clip, real["image"], real))}
    print(
        f"| {len(real['key'])} images of unseen emoji | {' | '.join(tables)} |\n|---|{'---|' * len(tables)}"
    )
    for what in tables["originals"]:
        print(f"| {what} | {' | '.join(f'{table[what]:.4g}' for table in tables.values())} |")
    shown = torch.arange(0, len(real["key"]), len(real["key"]) // COLUMNS)[:COLUMNS]
    write_sheet(
        options.out, {name: found[shown] for name, found in {"originals": real["image"], **images}.items()}
    )
    print(f"images: {options.out}: rows of originals, {', '.join(images)}")


if __name__ == "__main__":
    main()
