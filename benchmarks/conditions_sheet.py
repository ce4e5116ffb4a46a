"""Images of models under each condition: ``python -m benchmarks.conditions_sheet --out docs/conditions.png``.

Runs of configs/conditions, the same held-out samples in each column: the image, then for each run what the
model was given and what it drew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from data.shapes.scene import COLOURS
from ldm.data.module import Shards
from ldm.io.images import grid, to_bytes, write_png
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Batch

ZOOM = 3
"""Pixels of the sheet per pixel of an image."""


def masked(batch: Batch) -> Tensor:
    """Show what is known of the image, grey elsewhere."""
    return batch["image"] * (1.0 - batch["mask"])


def low(batch: Batch) -> Tensor:
    """Show the low-resolution copy, pixel by pixel."""
    return F.interpolate(batch["low_res"], batch["image"].shape[-2:], mode="nearest")


def coloured(batch: Batch) -> Tensor:
    """Show the map in the colours that its classes ask for, grey for the background."""
    palette = torch.tensor([(128, 128, 128), *COLOURS.values()], dtype=torch.float32) / 127.5 - 1.0
    return palette[batch["label_map"].clamp(max=len(palette) - 1)].permute(0, 3, 1, 2)


def boxes(batch: Batch) -> Tensor:
    """Show the boxes on grey; their classes have no image."""
    size = batch["image"].shape[-1]
    grey = torch.full((3, size, size), 128, dtype=torch.uint8)
    drawn = [
        draw_bounding_boxes(grey, (layout[:, 1:] * size).round(), colors="white")
        for layout in batch["layout"]
    ]
    return torch.stack(drawn).float() / 127.5 - 1.0


SHOWN: dict[str, Callable[[Batch], Tensor]] = {
    "inpainting": masked,
    "composite": masked,
    "super-resolution": low,
    "semantic": coloured,
    "layout": boxes,
}
"""Conditions of each run, as images."""


def sheet(runs: Path, shards: str, num: int) -> Tensor:
    """Lay out ``num`` columns: (3, H, W) uint8."""
    data = Shards(shards, shards, image_size=32, batch_size=num)
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    rows = [batch["image"]]
    for name, show in SHOWN.items():
        stage = load_stage(str(runs / name), Diffusion)
        rows += [show(batch), stage.generate(batch, seed=0)]
    return grid(F.interpolate(to_bytes(torch.cat(rows)), scale_factor=ZOOM, mode="nearest"), columns=num)


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/conditions"), help="Folder of the runs.")
    parser.add_argument("--shards", default="shards/conditions/val-000000.tar", help="Held-out samples.")
    parser.add_argument("--num", type=int, default=10, help="Number of samples.")
    parser.add_argument("--out", default="runs/conditions/sheet.png", help="File to write.")
    options = parser.parse_args()
    write_png(options.out, sheet(options.runs, options.shards, options.num), {"rows": ", ".join(SHOWN)})
    print(options.out)


if __name__ == "__main__":
    main()
