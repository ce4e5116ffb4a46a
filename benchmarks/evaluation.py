"""What does an evaluation cost beside the generation itself? ``python -m benchmarks.evaluation``.

Needs the runs of ``make demo``. Validates the demo's diffusion twice with the callback ``Evaluation``, and
times drawing apart from everything else that the callback does: the first evaluation looks at the real
images too, the second finds their statistics on the disk.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor

from data.shapes.reader import CaptionAccuracy
from ldm.callbacks.evaluation import Evaluation
from ldm.data.module import Shards
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.extractors.clip import CLIPExtractor
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.neighbours import Neighbours
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import CLIPTower, load_stage


class Clock:
    """Adds up seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a ``with`` block."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


class Timed(Evaluation):
    """Times all that the callback does, and drawing apart."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.all_of_it, self.drawing = Clock(), Clock()

    def images(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor:
        """Draw."""
        with self.drawing.running():
            return super().images(trainer, pl_module, batch)

    def on_validation_start(self, *arguments: Any) -> None:
        """Begin."""
        with self.all_of_it.running():
            super().on_validation_start(*arguments)

    def on_validation_batch_end(self, *arguments: Any) -> None:
        """Draw and measure."""
        with self.all_of_it.running():
            super().on_validation_batch_end(*arguments)

    def on_validation_epoch_end(self, *arguments: Any) -> None:
        """Compute, log and record."""
        with self.all_of_it.running():
            super().on_validation_epoch_end(*arguments)


def evaluated(stage: Diffusion, clip: str, shards: str, num: int, folder: str) -> tuple[float, float]:
    """Validate once; return the seconds of drawing and of everything else that the callback did."""
    measures = [Frechet(), KID(), CMMD(), Neighbours(), CLIPScore()]
    timed = Timed([FeatureMetrics(CLIPExtractor(CLIPTower(clip)), measures), CaptionAccuracy()], num)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[timed],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Shards(train=shards, val=shards, image_size=int(stage.image_size or 0), batch_size=64)
    trainer.validate(stage, data, verbose=False)
    return timed.drawing.seconds, timed.all_of_it.seconds - timed.drawing.seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--runs", default="runs/demo", help="Folder of the runs of make demo.")
    parser.add_argument("--data", default="shards/shapes/val-000000.tar", help="Validation shards.")
    parser.add_argument("--num", type=int, default=256, help="Images.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    stage = load_stage(f"{options.runs}/diffusion", Diffusion)
    print("| evaluation | drawing, s | everything else, s | share |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first", "second"):
            clip = f"{options.runs}/clip"
            drawing, rest = evaluated(stage, clip, options.data, options.num, folder)
            print(f"| {which} | {drawing:.1f} | {rest:.1f} | {rest / drawing:.1%} |")


if __name__ == "__main__":
    main()
