"""Do models obey their conditions: ``python -m benchmarks.conditions``, after the runs of configs/conditions.

Prints what the last evaluation of each run measured, and the same of the images themselves, of their
reconstructions by the autoencoder, and of the low-resolution copies enlarged bicubically.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.shapes.metrics import KnownPSNR, LayoutAccuracy, MapAgreement
from data.shapes.reader import CaptionAccuracy
from ldm.data.module import Shards
from ldm.io.images import from_bytes, to_bytes
from ldm.latents.space import AutoencoderLatents
from ldm.metrics.psnr import PSNR
from ldm.types import Batch

COLUMNS = ("known/psnr", "psnr", "caption/count", "caption/all", "map/objects", "layout/all")


def last_evaluation(run: Path) -> dict[str, float]:
    """Return the last value of each metric in a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {name: [row[f"val/{name}"] for row in rows if row.get(f"val/{name}")] for name in COLUMNS}
    return {name: float(values[-1]) for name, values in found.items() if values}


def references(autoencoder: str, shards: str, num: int) -> dict[str, dict[str, float]]:
    """Measure images that need no diffusion: originals, reconstructions, enlargements."""
    latents = AutoencoderLatents(autoencoder)
    makers: dict[str, Callable[[Batch], Tensor]] = {
        "the images themselves": lambda batch: batch["image"],
        "reconstructed": lambda batch: _reconstructed(latents, batch),
        "enlarged bicubically": _enlarged,
    }
    metrics = {
        name: [KnownPSNR(), PSNR(), CaptionAccuracy(), MapAgreement(), LayoutAccuracy()] for name in makers
    }
    data = Shards(shards, shards, image_size=32, batch_size=1)
    for number, loaded in enumerate(data.val_dataloader()):
        if number == num:
            break
        batch = data.on_after_batch_transfer(loaded, 0)
        for name, make in makers.items():
            images = from_bytes(to_bytes(make(batch)))
            for metric in metrics[name]:
                metric.update(images, batch)
    return {name: {k: v for m in some for k, v in m.compute().items()} for name, some in metrics.items()}


def _reconstructed(latents: AutoencoderLatents, batch: Batch) -> Tensor:
    image = batch["image"]
    return latents.decode(
        latents.encode(batch, image.new_zeros(len(image), *latents.shape(*image.shape[-2:])))
    )


def _enlarged(batch: Batch) -> Tensor:
    size = batch["image"].shape[-2:]
    return F.interpolate(batch["low_res"], size, mode="bicubic").clamp(-1.0, 1.0)


@torch.no_grad()
def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/conditions"), help="Folder of the runs.")
    parser.add_argument("--autoencoder", default="runs/demo/autoencoder", help="Run of the autoencoder.")
    parser.add_argument("--shards", default="shards/conditions/val-*.tar", help="Validation shards.")
    parser.add_argument(
        "--num", type=int, default=256, help="Images of the references, as the runs evaluate."
    )
    options = parser.parse_args()
    measured = {
        run.parent.name: last_evaluation(run.parent) for run in sorted(options.runs.glob("*/metrics.csv"))
    }
    measured |= references(options.autoencoder, options.shards, options.num)
    print(f"| images | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, values in measured.items():
        # equal images have no PSNR: what float32 makes of it is left out
        cells = [f"{values[column]:.3f}" if values.get(column, 99.0) < 99.0 else "" for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
