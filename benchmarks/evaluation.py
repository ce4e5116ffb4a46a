"""What does an evaluation cost beside the generation itself? ``python -m benchmarks.evaluation``.

Needs the runs of ``make demo``. Draws pictures for validation samples as the callback does, and times drawing
and measuring apart: the first evaluation, which looks at the real pictures too, and a later one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.shapes_reader import CaptionAccuracy
from ldm.candidates import Drawn, Repeated, Share
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.group import Alone
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.measurement import Measurement
from ldm.metrics.metric import Reals
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.towers import Towers
from ldm.real_pictures import open_shards
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


def evaluated(run: Measurement, candidate: Drawn, share: Share) -> tuple[float, float]:
    """Evaluate once; return the seconds of drawing and of everything else."""
    drawing, all_of_it = Clock(), Clock()
    with all_of_it.running():
        run.begin(Reals("validation"))
        pictures = candidate.pictures(share)
        while True:
            with drawing.running():
                found = next(pictures, None)
            if found is None:
                break
            batch, images = found
            if run.wants_real:
                run.see(batch)
            run.update(images, batch)
        run.finish()
    return drawing.seconds, all_of_it.seconds - drawing.seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--runs", default="runs/demo", help="Folder of the runs of make demo.")
    parser.add_argument("--data", default="shards/shapes/val-000000.tar", help="Validation shards.")
    parser.add_argument("--num", type=int, default=256, help="Pictures.")
    options = parser.parse_args()
    stage = load_stage(f"{options.runs}/diffusion", Diffusion)
    samples = Repeated(open_shards(options.data, stage.image_size), options.num)
    candidate = Drawn("demo", stage, {}, samples, 0, "32-true", {})
    measures = [Frechet(), KID(), CMMD(), Neighbours(), CLIPScore()]
    metrics = [FeatureMetrics(Towers(CLIPTower(f"{options.runs}/clip")), measures), CaptionAccuracy()]
    share = Share(0, 1, 64, torch.device("cpu"), 0)
    print("| evaluation | drawing, s | measuring, s | share |\n|---|---|---|---|")
    for which in ("first", "second"):
        drawing, rest = evaluated(Measurement(metrics, Alone(), share.device), candidate, share)
        print(f"| {which} | {drawing:.1f} | {rest:.1f} | {rest / drawing:.1%} |")


if __name__ == "__main__":
    main()
